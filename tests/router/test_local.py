"""The local layer against y = Σ wᵢ·fᵢ(x) written out, with mixed experts, policies, capacity and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts.errors import ConfigError, InvalidRequest, SpecMismatch, Unavailable
from expertmesh.experts.modules import GatedFeedForward, PackedExperts
from expertmesh.router import gates
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.local import LocalLayer

WIDTH, EXPERTS = 6, 4


def mixed_experts() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(WIDTH, WIDTH),
        "sin": torch.sin,
        "glu": GatedFeedForward(WIDTH, 10),
        "double": lambda x: 2 * x,
    }


def test_mixed_experts_make_one_layer() -> None:
    experts = mixed_experts()
    gate = gates.TopK(WIDTH, EXPERTS, k=2)
    x = torch.randn(9, WIDTH)
    routing = gate(x)
    expected = torch.stack([
        sum((w * list(experts.values())[e](row[None])[0] for e, w in zip(es, ws, strict=True)), torch.zeros(WIDTH))
        for row, es, ws in zip(x, routing.indices_TK.tolist(), routing.weights_TK, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(LocalLayer(gate, experts)(x), expected)
    torch.testing.assert_close(LocalLayer(gate, list(experts.values()))(x), expected)


def test_rows_of_any_shape_and_no_rows_at_all() -> None:
    layer = LocalLayer(gates.TopK(WIDTH, 2, k=1), [torch.sin, torch.cos])
    assert layer(torch.randn(5, 2, 3)).shape == (5, 2, 3)
    assert layer(torch.randn(0, 2, 3)).shape == (0, 2, 3)
    assert LocalLayer(gates.TopK(WIDTH, 2), PackedExperts(2, WIDTH, 4))(torch.randn(0, WIDTH)).shape == (0, WIDTH)


def test_shared_experts_gate_input_and_mask() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    layer = LocalLayer(gates.TopK(3, EXPERTS, k=1), mixed_experts(), shared=shared)
    x, features = torch.randn(5, WIDTH), torch.randn(5, 3)
    only_double = torch.tensor([False, False, False, True])
    answer = layer.answer(x, gate_input=features, mask_TE=only_double)
    torch.testing.assert_close(answer.output, 2 * x + shared(x))
    with pytest.raises(InvalidRequest, match="k is"):
        layer.answer(x, gate_input=features, k=EXPERTS + 1)


@pytest.mark.parametrize("policy", ["error", "renormalize", "residual", "fallback:double"])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_expert_that_answers_nan_follows_the_policy(policy: str, grouped: bool) -> None:
    x = torch.randn(4, WIDTH)
    experts: Any = mixed_experts() | {"linear": lambda rows: rows * math.nan}
    names = ["linear", "double"]
    if grouped:
        experts = PackedExperts(2, WIDTH, 8)
        nn.init.constant_(experts.down_proj[0], math.nan)
        policy = policy.replace("double", "1")
        double: Any = lambda rows: experts(rows, [0, 0, rows.shape[0]])  # noqa: E731
    else:
        experts, double = {name: experts[name] for name in names}, experts["double"]
    layer = LocalLayer(gates.Fixed([0.25, 0.75]), experts, on_missing=policy)
    if policy == "error":
        with pytest.raises(Unavailable, match=r"worst row 0\.25"):
            layer(x)
        return
    kind = policy.partition(":")[0]
    expected = {
        "renormalize": double(x),
        "residual": 0.25 * x + 0.75 * double(x),
        "fallback": 0.25 * double(x) + 0.75 * double(x),
    }[kind]
    answer = layer.answer(x)
    torch.testing.assert_close(answer.output, expected)
    assert answer.degraded
    assert answer.lost_mass_T.tolist() == [0.25] * 4


@pytest.mark.parametrize("on_dropped", ["zero", "residual"])
def test_capacity_drops_rows_by_the_declared_policy(on_dropped: str) -> None:
    layer = LocalLayer(
        gates.Fixed([1.0, 0.0], k=1), [torch.sin, torch.cos], capacity=Capacity(factor=1.0), on_dropped=on_dropped
    )
    x = torch.randn(4, 1)
    answer = layer.answer(x)
    torch.testing.assert_close(answer.output[:2], torch.sin(x[:2]))
    torch.testing.assert_close(answer.output[2:], x[2:] if on_dropped == "residual" else torch.zeros(2, 1))
    assert answer.degraded
    assert answer.dropped_T is not None
    assert answer.dropped_T.tolist() == [0, 0, 1, 1]


def test_gradients_reach_rows_gate_and_experts() -> None:
    torch.manual_seed(1)
    layer = LocalLayer(gates.TopK(WIDTH, 3, k=2), PackedExperts(3, WIDTH, 5), shared=nn.Linear(WIDTH, WIDTH)).double()
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_an_existing_routing_skips_the_gate() -> None:
    layer = LocalLayer(gates.Fixed([1.0, 1.0]), [torch.sin, torch.cos])
    x = torch.randn(3, 2)
    routing = Routing(torch.tensor([[1], [0], [1]]), torch.ones(3, 1))
    torch.testing.assert_close(layer.with_routing(x, routing).output, torch.stack([x[0].cos(), x[1].sin(), x[2].cos()]))


def test_votes_of_classifiers() -> None:
    def always(label: int) -> Any:
        return lambda rows: torch.full((rows.shape[0],), label)

    layer = LocalLayer(gates.Fixed([1 / 3] * 3), [always(4), always(2), always(4)], method="vote")
    assert layer(torch.zeros(2, 1)).tolist() == [4, 4]


def test_arguments_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ConfigError, match="chooses among 3 experts, but 2"):
        LocalLayer(gates.Fixed([1.0] * 3), [torch.sin, torch.cos])
    with pytest.raises(InvalidRequest, match="on_missing"):
        LocalLayer(gates.Fixed([1.0]), [torch.sin], on_missing="ignore")

    def narrow(rows: Tensor) -> Tensor:
        return rows[:, :1]

    with pytest.raises(SpecMismatch, match="differ in shape"):
        LocalLayer(gates.Fixed([1.0, 1.0]), [torch.sin, narrow])(torch.zeros(2, 3))
    broken = LocalLayer(gates.Fixed([0.5, 0.5]), [torch.sin, lambda x: x / 0], on_missing="fallback:none")
    with pytest.raises(ConfigError, match="fallback"):
        broken(torch.zeros(2, 3))
