"""A split network: the sum of its experts is its output, whatever its kind and however its units are divided."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.feed_forwards import HIDDEN, KINDS, WIDTH, feed_forward, kinds, rows, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.transform.split import split
from expertmesh.experts.weights.files import load_into, tensor_digest, tensors_of
from expertmesh.router import gates
from expertmesh.router.mixture.local import LocalLayer


@given(kind=kinds, experts=st.sampled_from([1, 2, 3, 4, 6, 12]), by=st.sampled_from(["blocks", "activations"]), s=seeds)
@settings(max_examples=60)
def test_s7_the_experts_of_a_dense_network_sum_to_its_output(kind: str, experts: int, by: str, s: int) -> None:
    dense, x_RD = feed_forward(kind, s), rows(s)
    digest = tensor_digest(dense.state_dict())
    parts, report = split(dense, experts, by=by, rows=x_RD, seed=s)
    layer = LocalLayer(gates.Fixed([1.0] * experts), parts)
    torch.testing.assert_close(layer(x_RD), dense(x_RD), rtol=1e-9, atol=1e-12)
    assert report.relative_l2 == pytest.approx(0, abs=1e-12)
    assert report.hidden_units.after == HIDDEN // experts
    columns = torch.cat([part.down_proj.weight for part in parts], dim=1)  # every unit once
    assert sorted(columns.T.tolist()) == sorted(dense.down_proj.weight.T.tolist())
    assert tensor_digest(dense.state_dict()) == digest


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_fits_one_factory(kind: str) -> None:
    parts, report = split(feed_forward(kind), 3, by="activations", rows=rows(), k=3)
    for part in parts:
        load_into(feed_forward(kind, 1, HIDDEN // 3), tensors_of(part), "weights")
        assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in part.parameters())
    assert report.relative_l2_of_k == pytest.approx(0, abs=1e-12)
    bias = sum(part.down_proj.bias.numel() for part in parts[1:] if part.down_proj.bias is not None)
    assert (report.all_parameters.after or 0) - (report.all_parameters.before or 0) == bias


def test_units_that_are_active_together_stay_together() -> None:
    """Two kinds of rows, each with hidden units of its own: then one expert of two is enough for every row."""
    dense = FeedForward(2, 8, activation="relu", bias=False).double()
    with torch.no_grad():
        dense.up_proj.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 1))  # the kinds take turns
    x_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    _, clustered = split(dense, 2, by="activations", rows=x_RD, k=1)
    _, in_blocks = split(dense, 2, by="blocks", rows=x_RD, k=1)
    assert clustered.relative_l2_of_k == pytest.approx(0, abs=1e-12)
    assert (in_blocks.relative_l2_of_k or 0) > 0.1
    assert json.loads(json.dumps(clustered.as_dict()))["hidden_units"] == {"before": 8, "after": 4}
    assert "hidden units" in str(clustered)


@pytest.mark.parametrize(
    ("module", "experts", "options", "error", "message"),
    [
        (nn.Linear(WIDTH, 4), 2, {}, ConfigError, "the expert is a Linear, but must be a FeedForward"),
        (feed_forward("plain"), 5, {}, SpecMismatch, "into 5 experts of equal size: choose one of 1, 2, 3, 4, 6, 12"),
        (feed_forward("plain"), 2, {"by": "rows"}, ConfigError, "by is 'rows', but must be one of blocks, activations"),
        (feed_forward("plain"), 2, {"by": "activations"}, ConfigError, r"by='activations' needs rows of .*rows, 5\]"),
        (feed_forward("plain"), 2, {"k": 1}, ConfigError, "k needs rows"),
        (feed_forward("plain"), 2, {"k": 3, "rows": rows()}, ConfigError, "k is 3, but must be between 1 and 2"),
        (feed_forward("plain"), 2, {"rows": torch.zeros(3, 4)}, SpecMismatch, r"rows are \[3, 4\] torch.float32, but"),
        (feed_forward("plain"), 2, {"rows": rows(count=0)}, SpecMismatch, "at least one"),
    ],
)
def test_bad_input_is_refused(module: Any, experts: int, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split(module, experts, **options)
