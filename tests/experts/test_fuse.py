"""Fused experts: the formulas, tensor by tensor, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.feed_forwards import feed_forward, kinds, rows, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.transform.fuse import fuse
from expertmesh.experts.weights.files import tensor_digest, tensors_of


def pair(kind: str = "plain") -> list[Any]:
    return [feed_forward(kind, 0), feed_forward(kind, 1)]


@given(kind=kinds, load=st.lists(st.integers(0, 100), min_size=2, max_size=4).filter(sum), seed=seeds)
@settings(max_examples=40)
def test_s7_experts_become_their_weighted_average(kind: str, load: list[int], seed: int) -> None:
    experts = [feed_forward(kind, seed + index) for index in range(len(load))]
    before = [tensor_digest(expert.state_dict()) for expert in experts]
    fused, report = fuse(experts, "load", load=load, rows=rows())
    for name, tensor in tensors_of(fused).items():
        parts = [amount * tensors_of(expert)[name] for amount, expert in zip(load, experts, strict=True)]
        wanted = torch.stack(parts).sum(dim=0) / sum(load)
        torch.testing.assert_close(tensor, wanted)
    assert sum(report.weights) == pytest.approx(1)
    assert (report.parameters.before or 0) == len(load) * (report.parameters.after or 0)
    assert [tensor_digest(expert.state_dict()) for expert in experts] == before
    equal, _ = fuse(experts, "load", load=[3] * len(load))
    average, _ = fuse(experts)
    for one, other in zip(tensors_of(equal).values(), tensors_of(average).values(), strict=True):
        torch.testing.assert_close(one, other)


def angle(one: Tensor, other: Tensor) -> float:
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    return math.acos(max(-1.0, min(1.0, cosine)))


@given(t=st.floats(0, 1), seed=seeds)
@settings(max_examples=40)
def test_slerp_turns_by_its_share_of_the_angle_and_keeps_the_length(t: float, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = (nn.Linear(4, 3, bias=False).double() for _ in range(2))
    with torch.no_grad():
        second.weight.mul_(first.weight.norm() / second.weight.norm())
    a, b = first.weight.detach(), second.weight.detach()
    middle = fuse([first, second], "slerp", t=t)[0].get_parameter("weight").detach()
    assert float(middle.norm()) == pytest.approx(float(a.norm()), rel=1e-9)
    assert math.cos(angle(a, middle)) == pytest.approx(math.cos(t * angle(a, b)), abs=1e-9)
    back = fuse([second, first], "slerp", t=1 - t)[0].get_parameter("weight").detach()
    torch.testing.assert_close(back, middle)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_parallel_tensors_are_averaged_along_a_straight_line(factor: float) -> None:
    first, second = pair()
    second.load_state_dict({name: factor * tensor for name, tensor in first.state_dict().items()})
    fused, _ = fuse([first, second], "slerp", t=0.25)
    for name, tensor in tensors_of(fused).items():
        torch.testing.assert_close(tensor, (0.75 + 0.25 * factor) * tensors_of(first)[name])


def test_the_error_is_that_against_the_mean_answer() -> None:
    experts, x_RD = pair(), rows()
    fused, report = fuse(experts, "slerp", t=0.25, rows=x_RD)
    mean = 0.75 * experts[0](x_RD) + 0.25 * experts[1](x_RD)
    difference = (fused(x_RD) - mean).detach()
    assert report.relative_l2 == pytest.approx(float(difference.norm() / mean.detach().norm()))
    assert report.max_abs == pytest.approx(float(difference.abs().max()))
    assert json.loads(json.dumps(report.as_dict()))["weights"] == [0.75, 0.25]
    assert str(report).startswith("method slerp, weights 0.75 0.25, relative l2 ")
    same, report = fuse([experts[0]] * 3, rows=x_RD)
    assert report.relative_l2 == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(same(x_RD), experts[0](x_RD))


def test_low_precision_and_counters() -> None:
    norms = [nn.BatchNorm1d(3).to(torch.bfloat16) for _ in range(2)]
    fused, _ = fuse(norms)
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {torch.bfloat16, torch.int64}
    norms[1](torch.randn(4, 3, dtype=torch.bfloat16))
    with pytest.raises(SpecMismatch, match=r"'num_batches_tracked' is torch.int64 and differs among the experts"):
        fuse(norms)


@pytest.mark.parametrize(
    ("experts", "options", "error", "message"),
    [
        (pair(), {"method": "sum"}, ConfigError, "method is 'sum', but must be one of average, load, slerp"),
        (pair()[:1], {}, ConfigError, "'average' needs at least two experts, not 1"),
        ([*pair(), *pair()], {"method": "slerp"}, ConfigError, "'slerp' needs exactly two experts, not 4"),
        (pair(), {"load": [1, 2]}, ConfigError, "'average' takes no load: leave it out, or use method 'load'"),
        (pair(), {"t": 0.1}, ConfigError, "takes no t: leave it out, or use method 'slerp'"),
        (pair(), {"method": "slerp", "t": 2}, ConfigError, "t is 2, but must lie between 0"),
        (pair(), {"method": "load"}, ConfigError, "'load' needs load"),
        (pair(), {"method": "load", "load": [0, 0]}, ConfigError, "must hold 2 finite amounts"),
        (pair(), {"method": "load", "load": [1]}, ConfigError, "must hold 2 finite amounts"),
        ([feed_forward("plain"), feed_forward("gated")], {}, SpecMismatch, "expert 1 a GatedFeedForward"),
        ([feed_forward("plain"), feed_forward("plain", 0, 6)], {}, SpecMismatch, "expert 1 does not fit the first"),
        ([feed_forward("plain"), feed_forward("plain").float()], {}, SpecMismatch, "torch.float32"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], {}, SpecMismatch, "missing 'bias'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(experts: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fuse(experts, **options)


def test_another_activation_is_another_expert() -> None:
    first, second = pair("plain relu, 3 outputs")
    second.activation = torch.sigmoid
    with pytest.raises(SpecMismatch, match="experts 0 and 1 have different activation functions"):
        fuse([first, second])
