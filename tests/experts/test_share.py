"""Shared hidden units: the layer answers the same as before while the weights of each row sum to one, and only then."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from helpers.feed_forwards import HIDDEN, WIDTH, feed_forward, kinds, rows, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import GatedFeedForward
from expertmesh.experts.transform.share import share
from expertmesh.experts.weights.files import tensor_digest
from expertmesh.router import gates
from expertmesh.router.mixture.local import LocalLayer


def related(kind: str, count: int, common: int, seed: int, *, same_bias: bool = False) -> list[Any]:
    """Experts whose first `common` hidden units are the same, each with its units in an order of its own."""
    first, experts = feed_forward(kind, seed), []
    for index in range(count):
        expert = feed_forward(kind, seed + 1 + index)
        order = torch.randperm(HIDDEN)
        state = expert.state_dict()
        for name, tensor in first.state_dict().items():
            if name == "down_proj.bias":
                state[name] = tensor.clone() if same_bias else state[name]
            else:
                along = 1 if name == "down_proj.weight" else 0
                own = state[name].narrow(along, common, HIDDEN - common)
                mixed = torch.cat([tensor.narrow(along, 0, common), own], along)
                state[name] = mixed.index_select(along, order)
        expert.load_state_dict(state)
        experts.append(expert)
    return experts


@given(
    kind=kinds,
    count=st.integers(2, 4),
    common=st.integers(1, HIDDEN),
    same_bias=st.booleans(),
    k=st.integers(1, 4),
    seed=seeds,
)
@settings(max_examples=60)
def test_s7_shared_and_rests_answer_as_the_experts_did(
    kind: str, count: int, common: int, same_bias: bool, k: int, seed: int
) -> None:
    experts = related(kind, count, common, seed, same_bias=same_bias)
    before = [tensor_digest(expert.state_dict()) for expert in experts]
    shared, rests, report = share(experts, rows=rows())
    assert [tensor_digest(expert.state_dict()) for expert in experts] == before
    gate = gates.TopK(WIDTH, count, k=min(k, count)).double()
    nn.init.normal_(gate.weight)
    x_RD = rows(seed + 1)
    old, new = LocalLayer(gate, experts), LocalLayer(gate, rests, shared=shared)
    torch.testing.assert_close(new(x_RD), old(x_RD), rtol=1e-9, atol=1e-12)
    moved = min(common, HIDDEN - 1)
    assert report.shared_units == shared.up_proj.out_features == moved
    assert [rest.up_proj.out_features for rest in rests] == [HIDDEN - moved] * count
    assert report.hidden_units.after == count * HIDDEN - (count - 1) * moved
    assert report.shared_output_bias == (same_bias and experts[0].down_proj.bias is not None)
    assert report.relative_l2 == pytest.approx(0, abs=1e-12)


def test_without_weights_that_sum_to_one_the_answer_changes() -> None:
    experts = related("plain", 2, 6, 0)
    shared, rests, _ = share(experts)
    gate = gates.Fixed([0.5, 0.25])
    old, new = LocalLayer(gate, experts)(rows()), LocalLayer(gate, rests, shared=shared)(rows())
    torch.testing.assert_close(new - old, 0.25 * shared(rows()))


def test_a_unit_that_stands_twice_is_shared_as_often_as_all_have_it() -> None:
    experts = [feed_forward("gated", seed) for seed in (0, 1)]
    with torch.no_grad():
        for expert, times in zip(experts, (3, 2), strict=True):
            for projection in (expert.up_proj, expert.gate_proj):
                projection.weight[:times] = 0.5
            expert.down_proj.weight[:, :times] = 0.25
    shared, rests, report = share(experts, rows=rows())
    assert report.shared_units == 2
    assert isinstance(shared, GatedFeedForward)
    torch.testing.assert_close(shared(rows()) + rests[0](rows()), experts[0](rows()))
    assert (report.parameters.after or 0) < (report.parameters.before or 0)
    assert report.parameters_per_row.after == report.parameters_per_row.before
    assert json.loads(json.dumps(report.as_dict()))["shared_units"] == 2
    assert "shared units 2, shared output bias False" in str(report)


def test_experts_of_different_widths_share_too() -> None:
    one = feed_forward("plain", 0)
    other = feed_forward("plain", 1, 2)
    with torch.no_grad():
        other.up_proj.weight[0], other.up_proj.bias[0] = one.up_proj.weight[5], one.up_proj.bias[5]
        other.down_proj.weight[:, 0] = one.down_proj.weight[:, 5]
    shared, rests, _ = share([one, other])
    for expert, rest in zip((one, other), rests, strict=True):
        torch.testing.assert_close(shared(rows()) + rest(rows()), expert(rows()))


def copied_activation() -> list[Any]:
    experts = related("plain gelu_tanh, no bias", 2, 3, 0)
    return [experts[0], copy.deepcopy(experts[1])]


def test_a_copied_activation_is_the_same() -> None:
    assert share(copied_activation())[2].shared_units == 3


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        ([feed_forward("plain")], ConfigError, "1 experts are given, but sharing needs at least two"),
        ([feed_forward("plain"), feed_forward("plain", 1)], ConfigError, "have no hidden unit in common"),
        ([feed_forward("plain"), nn.Linear(2, 2)], ConfigError, "the expert is a Linear"),
        ([feed_forward("plain"), feed_forward("gated")], SpecMismatch, "expert 1 a GatedFeedForward"),
        ([feed_forward("plain"), feed_forward("plain relu, 3 outputs")], SpecMismatch, "different activation"),
        ([feed_forward("plain"), feed_forward("plain").float()], SpecMismatch, "experts 0 and 1 differ in inputs"),
    ],
)
def test_bad_input_is_refused(experts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        share(experts)
