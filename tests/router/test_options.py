"""Options of a request: what is accepted, and what is rejected with the name of the option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import InvalidRequest, SpecMismatch
from expertmesh.experts.protocol import CallOptions
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request.options import allowed_experts, gate_request

NAMES = ("a", "b", "c")
LAYER = Layer(
    "l", gates.TopK(4, 3, k=2), {name: Expert("torch:sin") for name in NAMES}, input=TensorSpec((4,), "float32")
)
X = torch.zeros(2, 4)
INDEX, WEIGHTS = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[0.5, 0.5], [1.0, 9.0]])

REJECTED: dict[str, tuple[dict[str, Any], dict[str, Any], type[InvalidRequest], str]] = {
    "a scalar": ({"x": torch.tensor(1.0)}, {}, SpecMismatch, r"x must be rows \[T, ...\]"),
    "another width": ({"x": torch.zeros(2, 5)}, {}, SpecMismatch, r"x has rows of shape \[5\], expected \[4\]"),
    "integers": ({"x": torch.zeros(2, 4).long()}, {}, SpecMismatch, "x has dtype int64, expected float32"),
    "complex rows": ({"x": torch.zeros(2, 4, dtype=torch.complex64)}, {}, InvalidRequest, "complex64 cannot be sent"),
    "an unknown policy": ({}, {"on_missing": "zero"}, InvalidRequest, "on_missing is 'zero'"),
    "an unknown fallback": ({}, {"on_missing": "fallback:z"}, InvalidRequest, "fallback 'z'"),
    "less than no lost mass": ({}, {"max_lost_mass": -0.1}, InvalidRequest, "max_lost_mass must lie between"),
    "lost mass that is no number": ({}, {"max_lost_mass": float("nan")}, InvalidRequest, "max_lost_mass must lie"),
    "features of other rows": (
        {"features": torch.zeros(3, 4)}, {}, SpecMismatch, r"gate_input of shape \[3, 4\] must have 2 rows"
    ),
    "a scalar as features": ({"features": torch.tensor(1.0)}, {}, SpecMismatch, r"gate_input of shape \[\] must"),
    "no choices": ({}, {"top_k": 0}, InvalidRequest, "top_k must lie between 1 and 3, not 0"),
    "too many choices": ({}, {"top_k": 4}, InvalidRequest, "top_k must lie between 1 and 3, not 4"),
    "no expert allowed": ({}, {"allow": []}, InvalidRequest, "leave no expert of layer l"),
    "every expert denied": ({}, {"deny": ["a", "l/b", "c"]}, InvalidRequest, "leave no expert"),
    "allowed and denied": ({}, {"allow": ["a"], "deny": ["l/a"]}, InvalidRequest, "leave no expert"),
    "an unknown expert allowed": (
        {}, {"allow": ["z"]}, InvalidRequest, "allow names 'z', which is not an expert of layer l"
    ),
    "an expert of another layer": ({}, {"deny": ["m/a"]}, InvalidRequest, "deny names 'm/a'"),
    "indices alone": ({"indices": INDEX}, {}, InvalidRequest, "belong together"),
    "weights alone": ({"weights": WEIGHTS}, {}, InvalidRequest, "belong together"),
    "a routing and top_k": (
        {"indices": INDEX, "weights": WEIGHTS}, {"top_k": 1}, InvalidRequest, "cannot be combined with a routing"
    ),
    "a routing and deny": (
        {"indices": INDEX, "weights": WEIGHTS}, {"deny": []}, InvalidRequest, "cannot be combined with a routing"
    ),
    "a routing of other rows": (
        {"indices": INDEX[:1], "weights": WEIGHTS[:1]}, {}, SpecMismatch, r"must both be \[2, K\]"
    ),
    "a routing of two shapes": ({"indices": INDEX, "weights": WEIGHTS[:, :1]}, {}, SpecMismatch, "must both be"),
    "a flat routing": ({"indices": INDEX[:, 0], "weights": WEIGHTS[:, 0]}, {}, SpecMismatch, "must both be"),
    "indices that are no integers": ({"indices": WEIGHTS, "weights": WEIGHTS}, {}, SpecMismatch, "must be integers"),
    "indices that are bools": ({"indices": INDEX > 0, "weights": WEIGHTS}, {}, SpecMismatch, "must be integers"),
    "weights that are integers": ({"indices": INDEX, "weights": INDEX}, {}, SpecMismatch, "floating point"),
    "an expert too high": ({"indices": INDEX + 1, "weights": WEIGHTS}, {}, InvalidRequest, "between -1 and 2"),
    "an expert too low": ({"indices": INDEX - 1, "weights": WEIGHTS}, {}, InvalidRequest, "between -1 and 2"),
    "a NaN weight": ({"indices": INDEX, "weights": WEIGHTS / 0}, {}, InvalidRequest, "must be finite"),
    "an expert twice": (
        {"indices": torch.tensor([[0, 1], [2, 2]]), "weights": WEIGHTS}, {}, InvalidRequest, "an expert twice"
    ),
    "a row without expert": (
        {"indices": torch.tensor([[0, 1], [-1, -1]]), "weights": WEIGHTS}, {}, InvalidRequest, "without any expert"
    ),
    "no choice at all": ({"indices": INDEX[:, :0], "weights": WEIGHTS[:, :0]}, {}, InvalidRequest, "without any"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_invalid_options_are_rejected(case: str) -> None:
    tensors, options, kind, message = REJECTED[case]
    arguments = {"x": X, **tensors}
    with pytest.raises(kind, match=message) as caught:
        gate_request(LAYER, arguments.pop("x"), CallOptions(layer="l", **options), **arguments)
    assert type(caught.value) is kind


def test_lists_of_names_become_masks() -> None:
    assert allowed_experts(LAYER, None, None) is None
    for allow, deny, expected in [
        (["a", "l/c"], None, [True, False, True]),
        (None, ["l/b"], [True, False, True]),
        (["a", "b", "b"], ["b"], [True, False, False]),
        (None, [], [True, True, True]),
    ]:
        mask = allowed_experts(LAYER, allow, deny)
        assert mask is not None
        assert mask.tolist() == expected


def test_features_replace_the_rows_for_the_gate() -> None:
    features = torch.ones(2, 7)
    checked = gate_request(LAYER, X, CallOptions(layer="l", top_k=1, deny=["a"]), features=features)
    assert checked.features is features
    assert checked.x is X
    assert (checked.k, checked.routing) == (1, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_callers_own_routing_is_used_as_it_is(dtype: torch.dtype, weights: torch.dtype) -> None:
    checked = gate_request(LAYER, X, CallOptions(layer="l"), indices=INDEX.to(dtype), weights=WEIGHTS.to(weights))
    assert checked.routing is not None
    assert torch.equal(checked.routing.indices_TK, INDEX)
    assert checked.routing.weights_TK.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert checked.routing.weights_TK.dtype == (torch.float64 if weights == torch.float64 else torch.float32)


@given(rows=st.integers(0, 4), choices=st.integers(0, 3), seed=st.integers(0, 999))
@settings(deadline=None)
def test_a_routing_is_either_accepted_or_rejected(rows: int, choices: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-2, 4, (rows, choices), generator=generator)
    x = torch.zeros(rows, 4)
    valid = all(
        all(-1 <= e <= 2 for e in row) and sum(e >= 0 for e in row) == len({e for e in row if e >= 0}) > 0
        for row in indices.tolist()
    )
    try:
        gate_request(LAYER, x, CallOptions(layer="l"), indices=indices, weights=torch.ones(rows, choices))
    except InvalidRequest:
        assert not valid
    else:
        assert valid


def test_a_request_without_rows_is_valid() -> None:
    empty: Tensor = X[:0]
    assert gate_request(LAYER, empty, CallOptions(layer="l")).size == 0


def test_a_shared_expert_cannot_be_denied_and_the_message_says_why() -> None:
    layer = replace(LAYER, shared={"s": Expert("torch:sin")})
    for name in ("s", "l/s"):
        with pytest.raises(InvalidRequest, match=f"deny names '{name}', a shared expert of layer l: .* leave it out"):
            gate_request(layer, X, CallOptions(layer="l", deny=[name]))
