"""Balance losses and statistics against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import InvalidRequest
from expertmesh.router.gates import NoisyTopK, Routing, TopK
from expertmesh.router.mixture import balance

EXPERTS, WIDTH, CHOICES = 6, 5, 2


def routed(count: int, seed: int) -> tuple[torch.Tensor, Routing]:
    torch.manual_seed(seed)
    gate = TopK(WIDTH, EXPERTS, CHOICES)
    scores_TE = gate.scores(torch.randn(count, WIDTH))
    return scores_TE, gate.select(scores_TE)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_statistics_and_losses_are_the_formulas(count: int, seed: int) -> None:
    scores_TE, routing = routed(count, seed)
    pairs = list(zip(routing.indices_TK.flatten().tolist(), routing.weights_TK.flatten().tolist(), strict=True))
    load = [sum(e == expert for e, _ in pairs) for expert in range(EXPERTS)]
    importance = [sum(w for e, w in pairs if e == expert) for expert in range(EXPERTS)]
    assert balance.load(routing, EXPERTS).tolist() == load
    assert balance.importance(routing, EXPERTS).tolist() == pytest.approx(importance, rel=1e-5, abs=1e-6)
    probabilities = scores_TE.softmax(dim=1)
    mean = probabilities.mean(dim=0).tolist()
    expected = EXPERTS * sum(load[e] / (count * CHOICES) * mean[e] for e in range(EXPERTS))
    assert balance.load_balance_loss(probabilities, routing).item() == pytest.approx(expected, rel=1e-4)
    logs = [math.log(sum(math.exp(score) for score in row)) ** 2 for row in scores_TE.tolist()]
    assert balance.z_loss(scores_TE).item() == pytest.approx(sum(logs) / count, rel=1e-4)
    average = sum(importance) / EXPERTS
    variance = sum((value - average) ** 2 for value in importance) / EXPERTS
    variation = balance.squared_variation(balance.importance(routing, EXPERTS)).item()
    assert variation == pytest.approx(variance / average**2, rel=1e-3, abs=1e-6)


def test_perfect_balance_costs_one_for_any_k() -> None:
    for k in (1, 2, 3):
        indices_TK = torch.stack([torch.arange(EXPERTS).roll(-t)[:k] for t in range(EXPERTS)])
        routing = Routing(indices_TK, torch.full((EXPERTS, k), 1 / k))
        flat = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
        assert balance.load_balance_loss(flat, routing).item() == pytest.approx(1.0)


def test_dropped_choices_carry_no_load() -> None:
    routing = Routing(torch.tensor([[0, -1], [-1, -1]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert balance.load(routing, 2).tolist() == [1, 0]
    assert balance.importance(routing, 2).tolist() == [1.0, 0.0]


def test_gradients_flow() -> None:
    scores_TE, routing = routed(4, 0)
    scores = scores_TE.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: balance.load_balance_loss(s.softmax(dim=1), routing), (scores,))
    assert torch.autograd.gradcheck(balance.z_loss, (scores,))
    weights = routing.weights_TK.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: balance.importance(Routing(routing.indices_TK, w), EXPERTS), (weights,))


def test_expected_load_is_the_probability_of_being_chosen_again() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(1, EXPERTS), torch.rand(1, EXPERTS) + 0.2
    noisy = clean + torch.randn(1, EXPERTS) * noise
    expected = []
    for e in range(EXPERTS):
        others = torch.cat([noisy[0, :e], noisy[0, e + 1 :]]).sort(descending=True).values
        again = clean[0, e] + torch.randn(200_000) * noise[0, e]
        expected.append((again > others[CHOICES - 1]).float().mean().item())
    assert balance.expected_load(clean, noisy, noise, CHOICES).tolist() == pytest.approx(expected, abs=6e-3)
    with pytest.raises(InvalidRequest, match="k is"):
        balance.expected_load(clean, noisy, noise, EXPERTS)


def test_expected_load_of_the_noisy_gate_has_a_gradient() -> None:
    gate = NoisyTopK(WIDTH, EXPERTS, CHOICES)
    x = torch.randn(8, WIDTH)
    load = balance.expected_load(gate.clean_scores(x), gate.scores(x), gate.noise_scale(x), CHOICES)
    balance.squared_variation(load).backward()
    assert gate.weight.grad is not None
    assert gate.noise_weight.grad is not None


def test_bias_moves_against_the_load() -> None:
    moved = balance.balanced_bias(torch.zeros(3), torch.tensor([9, 3, 6]), rate=0.1)
    assert moved.tolist() == pytest.approx([-0.1, 0.1, 0.0])
