"""The digest of experts and gates: each thing that makes the behaviour changes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.construct.factory import build
from expertmesh.experts.errors import ConfigError
from expertmesh.experts.identity.version_name import expert_digest, gate_digest, version_name
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.weights.files import tensor_digest
from expertmesh.router import gates
from expertmesh.router.gates import Gate


def digest(expert: Expert) -> str:
    function = build(expert)
    return expert_digest(expert, function.function, tensor_digest(function.state()))


BASE: dict[str, Any] = {"factory": "helpers.samples:Affine", "kwargs": {"width": 4, "scale": 2.0}}


@pytest.mark.parametrize(
    "change",
    [
        {"kwargs": {"width": 4, "scale": 2.5}},
        {"kwargs": {"width": 5, "scale": 2.0}},
        {"kwargs": {"width": 4, "scale": 2.0, "shift": 0.0}},
        {"kwargs": {}, "args": (4, 2.0)},
        {"factory": "torch.nn:Linear", "kwargs": {"in_features": 4, "out_features": 4}},
        {"input": TensorSpec((4,))},
        {"output": TensorSpec((4,), "float32")},
        {"framework": "torch"},
    ],
)
def test_a_change_of_the_declaration_is_another_behaviour(change: dict[str, Any]) -> None:
    assert digest(Expert(**BASE)) != digest(Expert(**{**BASE, **change}))


@pytest.mark.parametrize("change", [{"replicas": 3}, {"num_cpus": 2}, {"pack": "p"}, {"resources": {"a": 1}}])
def test_where_and_how_often_it_runs_is_not_behaviour(change: dict[str, Any]) -> None:
    assert digest(Expert(**BASE)) == digest(Expert(**{**BASE, **change}))


def test_the_order_of_arguments_is_not_behaviour() -> None:
    assert digest(Expert(**BASE)) == digest(Expert("helpers.samples:Affine", kwargs={"scale": 2.0, "width": 4}))


tensors = st.dictionaries(
    st.sampled_from(["a", "b", "a.b"]),
    st.tuples(st.lists(st.integers(0, 2), max_size=4), st.sampled_from([torch.float32, torch.float16, torch.int32])),
    max_size=3,
)


@given(tensors, tensors)
@settings(deadline=None)
def test_equal_digests_are_equal_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    digests = [
        tensor_digest({name: torch.tensor(v, dtype=dtype) for name, (v, dtype) in given.items()})
        for given in (one, other)
    ]
    assert (digests[0] == digests[1]) == (one == other)


def test_one_bit_of_the_weights_is_another_behaviour() -> None:
    function = build(Expert(**BASE))
    state = {name: tensor.clone() for name, tensor in function.state().items()}
    state["bias"][0] = -0.0
    assert expert_digest(function.expert, function.function, tensor_digest(state)) != digest(Expert(**BASE))


@pytest.mark.parametrize(
    "other",
    [
        gates.TopK(4, 3, k=1),
        gates.TopK(4, 3, k=2, bias=True),
        gates.TopK(4, 3, k=2, softmax="before"),
        gates.Sigmoid(4, 3, k=2),
        gates.Fixed([0.1, 0.2, 0.7]),
    ],
)
def test_gates_differ_by_kind_arguments_and_weights(other: Gate) -> None:
    gate = gates.TopK(4, 3, k=2)
    moved = copy.deepcopy(gate)
    with torch.no_grad():
        moved.weight[0, 0] += 1
    digests = {gate_digest(g.name, g, g.state_dict()) for g in (gate, other, moved)}
    assert len(digests) == 3


def test_names_of_versions() -> None:
    assert version_name(7, "3fa1c2d40b9e" + "f" * 52) == "v7-3fa1c2d40b9e"


def test_arguments_without_a_stable_text_are_refused_as_the_operators_mistake() -> None:
    with pytest.raises(ConfigError, match="cannot be part of a version's digest"):
        expert_digest(Expert("helpers.samples:Affine", args=(object(),)), torch.sin, tensor_digest({}))


def test_a_gate_that_computes_something_else_raises_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gates.TopK(4, 3, 2)
    before = gate_digest(gate.name, gate, gate.state_dict())
    monkeypatch.setattr(gates.TopK, "scores", lambda self, x: x)  # its code alone is not part of its version
    assert gate_digest(gate.name, gate, gate.state_dict()) == before
    monkeypatch.setattr(gates.TopK, "revision", 2)
    assert gate_digest(gate.name, gate, gate.state_dict()) != before
