"""What is known to be wrong before anything starts: ports, GPUs, experts that do not fit together."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.cluster.config.preflight import check_layer
from expertmesh.cluster.machine.ports import check_port
from expertmesh.experts.errors import ConfigError, FailedPrecondition, NotFound, SpecMismatch
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.weights.files import save_tensors
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


def test_a_port_in_use_is_said_before_anything_starts(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(FailedPrecondition, match=rf"endpoint 127\.0\.0\.1:{port} cannot be used: Address already in"):
        check_port("127.0.0.1", port, "endpoint")
    check_port("127.0.0.1", 0, "endpoint")
    listener.close()
    check_port("127.0.0.1", port, "endpoint")


def test_an_address_that_is_not_ours_is_said() -> None:
    with pytest.raises(FailedPrecondition, match=r"metrics port 192.0.2.1:50051 cannot be used"):
        check_port("192.0.2.1", 50051, "metrics port")


def layer_of(*experts: Expert, **options: Any) -> Layer:
    named = {f"e{number}": expert for number, expert in enumerate(experts)}
    gate = options.pop("gate", None) or gates.Fixed([1.0] * len(experts))
    return Layer("l", gate, named, **options)


def linear(inputs: int, outputs: int, **options: Any) -> Expert:
    return Expert("torch.nn:Linear", args=(inputs, outputs), **options)


UNFIT = {
    "inputs": (layer_of(linear(4, 2), linear(3, 2)), r"layer l: l/e1 takes rows of \[3\].*l/e0 of \[4\]"),
    "outputs": (layer_of(linear(4, 2), linear(4, 3)), r"l: l/e1 gives rows of \[3\] .* do not fit together"),
    "declared rows": (layer_of(linear(4, 2), input=TensorSpec((5,))), r"l/e0 does not take rows of \[5\]"),
    "labels and logits": (
        layer_of(linear(4, 4), Expert("helpers.samples:labels", input=TensorSpec((4,)))), "gives rows of .* do not fit"
    ),
    "integers and floats": (
        layer_of(
            Expert("torch.nn:Embedding", args=(8, 4), input=TensorSpec((4,), "int64")),
            Expert("torch:sin", input=TensorSpec((4,), "float32")),
        ),
        "takes rows of .* do not fit together",
    ),
    "a shared expert": (
        layer_of(linear(4, 2), shared={"s": linear(4, 3)}), r"l: l/s gives rows of \[3\] .* do not fit together"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_experts_that_do_not_fit_together(case: str) -> None:
    layer, message = UNFIT[case]
    with pytest.raises(SpecMismatch, match=message):
        check_layer(layer)


def test_what_is_found_out_is_filled_in() -> None:
    found = check_layer(layer_of(linear(4, 4), Expert("helpers.samples:relu")))
    assert found.input == TensorSpec((4,))
    assert [expert.input for expert in found.experts.values()] == [TensorSpec((4,))] * 2
    assert [expert.output.shape for expert in found.experts.values()] == [(4,), (4,)]


def test_floating_dtypes_are_each_experts_own() -> None:
    half = linear(4, 4, kwargs={"dtype": torch.bfloat16}, input=TensorSpec((4,), "bfloat16"))
    found = check_layer(layer_of(half, linear(4, 4), input=TensorSpec((4,), "float16")))
    assert [expert.input.dtype for expert in found.experts.values()] == ["bfloat16", None]
    assert found.input.shape == (4,)


def test_live_experts_are_checked_and_filled_in_too() -> None:
    found = check_layer(layer_of(Expert.from_module(nn.Linear(4, 2)), Expert.from_function(lambda rows: rows[:, :2])))
    assert found.input == TensorSpec((4,))
    assert [expert.output.shape for expert in found.experts.values()] == [(2,), (2,)]
    with pytest.raises(SpecMismatch, match=r"l/e1 gives rows of \[4\]"):
        check_layer(
            layer_of(Expert.from_module(nn.Linear(4, 2)), Expert.from_function(torch.neg, input=TensorSpec((4,))))
        )


def test_the_gate_that_serves_is_a_copy_that_does_not_learn() -> None:
    gate = gates.NoisyTopK(4, 2, k=1)
    layer = layer_of(linear(4, 4), linear(4, 4), gate=gate)
    found = check_layer(layer)
    assert gate.training
    assert not found.gate.training
    with torch.no_grad():
        gate.weight.zero_()
    assert not bool((found.gate.state_dict()["weight"] == 0).all())


def test_a_mistake_of_an_expert_is_told_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^l/e1: factory 'helpers.samples:no_such'"):
        check_layer(layer_of(Expert("torch:sin"), Expert("helpers.samples:no_such")))
    with pytest.raises(NotFound, match=r"^l/e0: there is no weights file 'w.safetensors'"):
        check_layer(layer_of(linear(4, 2, weights=tmp_path / "w.safetensors")))
    save_tensors(tmp_path / "w.safetensors", {"weight": torch.zeros(2, 4)})
    with pytest.raises(SpecMismatch, match=r"^l/e0: weights .* does not fit the expert: missing 'bias'"):
        check_layer(layer_of(linear(4, 2, weights=tmp_path / "w.safetensors")))


def test_weights_are_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
    huge = linear(1 << 20, 1 << 20, weights=tmp_path / "w.safetensors")  # 4 TiB
    with pytest.raises(SpecMismatch, match=r"'weight' is .* has"):
        check_layer(layer_of(huge))


@pytest.mark.parametrize("everywhere", [False, True])
def test_code_that_is_elsewhere_is_left_to_its_replica(everywhere: bool) -> None:
    away = Expert("not_installed_here:Model", runtime_env=None if everywhere else {"working_dir": "/code"})
    found = check_layer(layer_of(away, linear(4, 4)), code_elsewhere=everywhere)
    assert found.experts["e0"].output.shape == (4,)
    with pytest.raises(ConfigError, match="l/e0: factory 'not_installed_here:Model'"):
        check_layer(layer_of(Expert("not_installed_here:Model"), linear(4, 4)))
    with pytest.raises(SpecMismatch):
        check_layer(layer_of(away, linear(4, 4), linear(3, 3)), code_elsewhere=everywhere)
