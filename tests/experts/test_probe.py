"""What is found out of an expert's rows before anything starts, and that it costs no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.construct.factory import build
from expertmesh.experts.construct.probe import check_declaration, complete
from expertmesh.experts.errors import ConfigError, DataLoss, NotFound, SpecMismatch
from expertmesh.experts.spec import ANY, Expert, TensorSpec
from expertmesh.experts.weights.files import save_tensors

HUGE = Expert("torch.nn:Linear", args=(1 << 20, 1 << 20))  # 4 TiB of weights


def test_a_module_is_checked_without_its_memory() -> None:
    found = check_declaration(HUGE, "l/e", ANY)
    assert found == (TensorSpec((1 << 20,)), TensorSpec((1 << 20,), "float32"))
    with pytest.raises(SpecMismatch, match=r"l/e does not take rows of \[3\] any dtype"):
        check_declaration(HUGE, "l/e", TensorSpec((3,)))


def test_a_weights_header_that_does_not_fit_is_refused_before_any_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)})
    expert = Expert("torch.nn:Linear", args=(1 << 20, 1 << 20), weights=path)
    with pytest.raises(SpecMismatch, match=r"l/e: weights .*'bias' is \[2\].*'weight' is \[2, 3\].*unexpected 'more'"):
        check_declaration(expert, "l/e", ANY)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_a_weights_header_of_any_dtype_fits_its_module(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    kwargs = {"in_features": 4, "out_features": 4, "bias": False, "dtype": getattr(torch, dtype)}
    save_tensors(path, {"weight": torch.zeros(4, 4).to(kwargs["dtype"])})
    rows = TensorSpec(None, "float32" if dtype.startswith("float8") else None)
    expert = Expert("torch.nn:Linear", kwargs=kwargs, weights=path, input=rows)
    assert check_declaration(expert, "l/e", ANY)[1].shape == (4,)
    save_tensors(path, {"weight": torch.zeros(4, 4).int()})
    with pytest.raises(SpecMismatch, match=rf"torch.int32, but the expert has \[4, 4\] torch.{dtype}"):
        check_declaration(expert, "l/e", ANY)


def test_weights_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(NotFound):
        check_declaration(Expert("torch.nn:Linear", args=(4, 4), weights=path), "l/e", ANY)
    path.write_bytes(b"no")
    with pytest.raises(DataLoss):
        check_declaration(Expert("torch.nn:Linear", args=(4, 4), weights=path), "l/e", ANY)


@pytest.mark.parametrize(
    "factory", ["helpers.samples:Sizes", "helpers.samples:LooksAtData", "helpers.samples:LooksAtPlaces"]
)
def test_code_that_reads_numbers_is_not_refused(factory: str) -> None:
    input_spec, _ = check_declaration(Expert(factory), "l/e", TensorSpec((4,)))
    assert input_spec.shape == (4,)


def test_code_that_reads_numbers_when_it_is_built_is_checked_all_the_same(tmp_path: Path) -> None:
    assert check_declaration(Expert("helpers.samples:Sizes"), "l/e", TensorSpec((4,)))[1] == TensorSpec((4,), "float32")
    with pytest.raises(SpecMismatch, match="does not take rows"):
        check_declaration(Expert("helpers.samples:Sizes"), "l/e", TensorSpec((3,)))
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"linear.bias": torch.zeros(3)})
    with pytest.raises(SpecMismatch, match=r"missing 'linear.weight'"):
        check_declaration(Expert("helpers.samples:Sizes", weights=path), "l/e", ANY)


@pytest.mark.parametrize(
    "factory",
    ["helpers.samples:raises", "helpers.samples:text", "helpers.samples:narrow", "helpers.samples:complex_rows"],
)
def test_an_expert_that_cannot_answer_is_refused_by_name(factory: str) -> None:
    with pytest.raises(SpecMismatch, match=r"l/e does not take rows of \[4\] any dtype"):
        check_declaration(Expert(factory), "l/e", TensorSpec((4,)))


def test_an_answer_other_than_declared_is_refused() -> None:
    with pytest.raises(SpecMismatch, match=r"the answer of l/e has rows of shape \[4\], expected \[5\]"):
        check_declaration(Expert("torch:sin", output=TensorSpec((5,))), "l/e", TensorSpec((4,)))
    with pytest.raises(SpecMismatch, match="the answer of l/e has dtype int64, expected float32"):
        check_declaration(Expert("helpers.samples:labels", output=TensorSpec((), "float32")), "l/e", TensorSpec((4,)))


@given(
    own=st.none() | st.sampled_from(["float64", "float16", "bfloat16"]),
    layer=st.none() | st.sampled_from(["float32", "float16", "bfloat16"]),
    factory=st.sampled_from(["helpers.samples:relu", "helpers.samples:Half", "helpers.samples:Affine", "torch:sin"]),
)
@settings(deadline=None)
def test_floating_dtypes_of_the_layer_do_not_become_those_of_an_expert(
    own: str | None, layer: str | None, factory: str
) -> None:
    expert = Expert(factory, input=TensorSpec(None, own))
    if own is not None and factory in ("helpers.samples:Half",) and own != "float16":
        return  # its own declaration is wrong
    input_spec, output_spec = check_declaration(expert, "l/e", TensorSpec((4,), layer))
    assert input_spec == TensorSpec((4,), own)
    assert output_spec.shape == (4,)


def test_integer_rows_of_the_layer_are_those_of_its_experts() -> None:
    expert = Expert("torch.nn:Embedding", args=(8, 3))
    found = check_declaration(expert, "l/e", TensorSpec((2,), "int64"))
    assert found == (TensorSpec((2,), "int64"), TensorSpec((2, 3), "float32"))


def test_rows_of_unknown_shape_are_not_tried() -> None:
    assert check_declaration(Expert("helpers.samples:raises"), "l/e", ANY) == (ANY, ANY)


def test_a_live_module_is_checked_and_stays_the_callers() -> None:
    module = nn.Linear(4, 2).train()
    found = check_declaration(Expert.from_module(module), "l/e", ANY)
    assert found == (TensorSpec((4,)), TensorSpec((2,), "float32"))
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(SpecMismatch, match="l/e does not take rows"):
        check_declaration(Expert.from_module(module), "l/e", TensorSpec((5,)))


def test_a_live_object_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream = iter_of_nothing()

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    def iter_of_nothing() -> Any:
        yield None

    with pytest.raises(ConfigError, match="the live Locked cannot be copied, and every replica needs its own"):
        check_declaration(Expert.from_module(Locked()), "l/e", ANY)


def test_complete_fills_in_what_a_built_expert_says_of_itself() -> None:
    function = build(Expert("torch.nn:Linear", args=(4, 2), kwargs={"dtype": torch.bfloat16}))
    assert complete(function, "l/e") == (TensorSpec((4,)), TensorSpec((2,), "bfloat16"))
    function = build(Expert("helpers.samples:relu", input=TensorSpec((2, 2), "float16")))
    assert complete(function, "l/e") == (TensorSpec((2, 2), "float16"), TensorSpec((2, 2), "float16"))
