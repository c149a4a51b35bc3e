"""From declarations to functions over rows: what is called and what is the expert itself, dtypes, and bad answers."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expertmesh.experts.construct import factory
from expertmesh.experts.construct.factory import RowFunction, build, locate
from expertmesh.experts.errors import ConfigError, ExpertFailed, NotFound, SpecMismatch
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.weights.files import save_tensors

ROWS = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 4.0, -1.0, 2.0]])


class With(nn.Module):
    """A module that gives its rows back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def test_a_class_is_constructed() -> None:
    function = build(Expert("helpers.samples:Affine", kwargs={"width": 4, "scale": 2.0}))
    assert torch.equal(function(ROWS), ROWS * 2)
    assert not any(parameter.requires_grad for parameter in function.state().values())
    assert function.module is not None
    assert not function.module.training


def test_a_factory_without_arguments_is_called() -> None:
    assert isinstance(build(Expert("helpers.samples:make_linear")).module, nn.Linear)
    assert torch.equal(build(Expert("helpers.samples:make_scale"))(ROWS), ROWS * 3)
    assert torch.equal(build(Expert("helpers.samples:make_scale", kwargs={"by": 5.0}))(ROWS), ROWS * 5)


@pytest.mark.parametrize(
    ("factory", "wanted"), [("helpers.samples:relu", ROWS.relu()), ("helpers.samples:scaled", ROWS * 2)]
)
def test_any_other_function_is_the_expert_itself(factory: str, wanted: torch.Tensor) -> None:
    assert torch.equal(build(Expert(factory))(ROWS), wanted)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(2)", r"importing 'quits' failed: it called sys.exit\(2\)"),
        ("def make():\n    raise SystemExit('no licence')", r"called with its args: it called sys.exit\(no licence\)"),
    ],
)
def test_code_that_exits_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "quits.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quits", raising=False)
    with pytest.raises(ConfigError, match=message):
        build(Expert("quits:make"))


@pytest.mark.parametrize("name", ["sin", "torch.nn.functional.relu", "numpy.tanh", "numpy.flip", "scipy.special.expit"])
def test_functions_of_libraries(name: str) -> None:
    if "." not in name:
        name = f"torch.{name}"
    module, _, attribute = name.rpartition(".")
    answer = build(Expert(f"{module}:{attribute}"))(ROWS)
    argument = ROWS if module.startswith("torch") else ROWS.numpy()
    wanted = torch.as_tensor(np.ascontiguousarray(getattr(importlib.import_module(module), attribute)(argument)))
    assert torch.allclose(answer, wanted)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:f", "importing 'no_such_module' failed"),
        ("helpers.samples:no_such", "'helpers.samples' has no attribute 'no_such'"),
        ("helpers.samples:Affine.no_such", "'helpers.samples' has no attribute 'Affine.no_such'"),
        ("helpers.samples:SOMETHING", "is a int, not a class or function"),
        ("helpers.samples:make_number", "returned a int, not a module or function"),
        ("helpers.samples:make_trouble", "failed when called with its args: no such device"),
    ],
)
def test_a_wrong_factory_says_what_is_wrong(factory: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Expert(factory))


def test_wrong_arguments_are_the_operators_mistake() -> None:
    with pytest.raises(ConfigError, match=r"failed when called with its args: .*'depth'"):
        build(Expert("helpers.samples:Affine", kwargs={"depth": 3}))
    with pytest.raises(ConfigError, match="cannot be part of a version's digest"):
        build(Expert("helpers.samples:Affine", args=(object(),)))


def test_a_method_of_a_class_can_be_named() -> None:
    assert locate("torch:Tensor.relu")(ROWS).equal(ROWS.relu())


@pytest.mark.parametrize(("name", "kind"), [("narrow", r"shape \[1, 4\] for 2 rows"), ("text", "returned str")])
def test_an_answer_that_is_not_its_rows_is_the_experts_failure(name: str, kind: str) -> None:
    with pytest.raises(ExpertFailed, match=kind):
        build(Expert(f"helpers.samples:{name}"))(ROWS)


def test_an_answer_that_cannot_be_sent_is_the_experts_failure() -> None:
    with pytest.raises(ExpertFailed, match="complex64"):
        build(Expert("helpers.samples:complex_rows"))(ROWS)
    with pytest.raises(ExpertFailed, match=r"shape \[\] for 2 rows"):
        build(Expert("numpy:mean"))(ROWS)


@given(
    seed=st.integers(0, 99),
    rows=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=60)
def test_numpy_functions_take_every_floating_dtype(seed: int, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn((rows, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)
    answer = build(Expert("helpers.samples:halves", framework="numpy"))(x)
    assert answer.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(answer.to(dtype), x / 2)


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3)[:, ::-1], np.broadcast_to(np.float32(1), (2, 3))])
def test_any_layout_of_a_numpy_answer_is_taken(array: np.ndarray) -> None:
    answer = build(Expert.from_function(lambda rows: array))(ROWS)
    assert torch.equal(answer, torch.tensor(array.tolist()).to(answer.dtype))


@pytest.mark.parametrize("given_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_module_gets_rows_of_its_parameters_dtype(given_dtype: torch.dtype) -> None:
    half = build(Expert("helpers.samples:Half"))
    assert half(ROWS.to(given_dtype)).dtype == torch.float16
    declared = build(Expert("helpers.samples:relu", input=TensorSpec((4,), "bfloat16")))
    assert declared(ROWS.to(given_dtype)).dtype == torch.bfloat16
    assert build(Expert("helpers.samples:relu"))(ROWS.to(given_dtype)).dtype == given_dtype


def test_weights_in_eight_bits_do_not_say_what_rows_are() -> None:
    scaled = nn.Module()
    scaled.weight = nn.Parameter(torch.eye(4).to(torch.float8_e4m3fn), requires_grad=False)
    assert build(Expert.from_module(With(scaled)))(ROWS.double()).dtype == torch.float64
    scaled.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    assert build(Expert.from_module(With(scaled)))(ROWS.double()).dtype == torch.bfloat16


def test_integer_rows_stay_integers() -> None:
    embedding = Expert("torch.nn:Embedding", args=(8, 3), input=TensorSpec((2,), "int64"))
    assert build(embedding)(torch.tensor([[1, 2]])).shape == (1, 2, 3)


def test_random_initial_weights_are_equal_on_every_build_and_disturb_nobody() -> None:
    declared = Expert("torch.nn:Linear", args=(4, 4))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build(declared)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = build(declared)
    other = build(Expert("torch.nn:Linear", args=(4, 4), kwargs={"bias": True}))
    assert torch.equal(first.state()["weight"], again.state()["weight"])
    named = [build(declared, id=id).state()["weight"] for id in ("l/a", "l/b", "l/a")]
    assert torch.equal(named[0], named[2])
    assert not torch.equal(named[0], named[1])
    assert not torch.equal(named[0], first.state()["weight"])
    assert not torch.equal(first.state()["weight"], other.state()["weight"])


def test_weights_come_from_the_file(tmp_path: Any) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"bias": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert torch.equal(build(Expert("helpers.samples:Affine", weights=path))(ROWS), ROWS + torch.tensor([1.0, 2, 3, 4]))
    with pytest.raises(NotFound, match=r"no weights file 'other\.safetensors'"):
        build(Expert("helpers.samples:Affine", weights=tmp_path / "other.safetensors"))
    with pytest.raises(SpecMismatch, match="does not fit the expert"):
        build(Expert("helpers.samples:Affine", args=(5,), weights=path))
    with pytest.raises(ConfigError, match="plain function"):
        build(Expert("torch:sin", weights=path))


def test_rows_are_not_written_into() -> None:
    x = ROWS.clone()
    function: RowFunction = build(Expert("helpers.samples:Affine", kwargs={"scale": 3.0}))
    function(x)
    assert torch.equal(x, ROWS)


BUFFER = torch.zeros(2, 4)


def doubles_in_place(rows: torch.Tensor) -> torch.Tensor:
    return torch.mul(rows, 2, out=BUFFER)


def test_who_is_answered_from_a_buffer_gets_no_rows_of_a_call_from_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a version is probed while it serves; here the second call comes, for certain, before the copy."""
    serving = build(Expert.from_function(doubles_in_place))
    copy, probed = factory.own_rows, threading.Event()

    def probe() -> None:
        serving.on(torch.device("cpu"))(ROWS * 100)
        probed.set()

    probing = threading.Thread(target=probe)

    def copied_later(*result: Any) -> torch.Tensor:
        if threading.current_thread() is not probing:
            probing.start()
            probed.wait(0.3)
        return copy(*result)

    monkeypatch.setattr(factory, "own_rows", copied_later)
    assert torch.equal(serving(ROWS), ROWS * 2)
    probing.join(30)
    assert probed.is_set()
