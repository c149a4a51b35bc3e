"""Every gate against its formula, written out row by row in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.gate_samples import EXPERTS, chosen, close, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router import gates

MANY = settings(max_examples=40, deadline=None)


def softmax(values: list[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def naive_top_k(h: list[float], gate: Any) -> dict[int, float]:
    picked = best(h, gate.k)
    return dict(zip(picked, softmax([h[e] for e in picked]), strict=True))


def naive_top_k_before(h: list[float], gate: Any) -> dict[int, float]:
    return {e: softmax(h)[e] for e in best(h, gate.k)}


def in_best_groups(choice: list[float], gate: Any, count: int) -> list[float]:
    size = len(choice) // gate.groups
    sums = [sum(sorted(choice[g * size : (g + 1) * size])[-count:]) for g in range(gate.groups)]
    kept = best(sums, gate.top_groups)
    return [value if e // size in kept else -math.inf for e, value in enumerate(choice)]


def naive_top_k_grouped(h: list[float], gate: Any) -> dict[int, float]:
    return {e: 16.0 * softmax(h)[e] for e in best(in_best_groups(h, gate, 1), gate.k)}


def naive_switch(h: list[float], gate: Any) -> dict[int, float]:
    return {best(h, 1)[0]: max(softmax(h))}


def naive_sigmoid(h: list[float], gate: Any) -> dict[int, float]:
    s = [sigmoid(value) for value in h]
    choice = in_best_groups([a + b for a, b in zip(s, gate.expert_bias.tolist(), strict=True)], gate, 2)
    picked = best(choice, gate.k)
    return {e: gate.scale * s[e] / sum(s[i] for i in picked) for e in picked}


def naive_threshold(h: list[float], gate: Any) -> dict[int, float]:
    p = [sigmoid(value) for value in h] if gate.score == "sigmoid" else softmax(h)
    picked = [e for e in range(len(h)) if p[e] >= gate.threshold] or best(h, 1)
    total = sum(p[e] for e in picked) if gate.renormalize else 1.0
    return {e: p[e] / total for e in picked}


def naive_top_p(h: list[float], gate: Any) -> dict[int, float]:
    p, picked = softmax(h), []
    for e in best(h, len(h)):
        if sum(p[i] for i in picked) >= gate.p:
            break
        picked.append(e)
    return {e: p[e] for e in picked}


def naive_hash(h: list[float], gate: Any) -> dict[int, float]:
    return dict.fromkeys(best(h, gate.k), 1 / gate.k)


def naive_fixed(h: list[float], gate: Any) -> dict[int, float]:
    return {e: h[e] for e in best([abs(w) for w in h], gate.k)}


NAIVE: dict[str, Callable[[list[float], Any], dict[int, float]]] = {
    "top_k": naive_top_k,
    "top_k before": naive_top_k_before,
    "top_k grouped": naive_top_k_grouped,
    "switch": naive_switch,
    "noisy_top_k": naive_top_k,
    "sigmoid": naive_sigmoid,
    "sigmoid grouped": naive_sigmoid,
    "threshold": naive_threshold,
    "threshold softmax": naive_threshold,
    "top_p": naive_top_p,
    "cosine": naive_top_k,
    "hash": naive_hash,
    "fixed": naive_fixed,
    "custom": naive_top_k,
}


def test_every_gate_has_its_formula_here() -> None:
    assert {sample.partition(" ")[0] for sample in NAIVE} | {"expert_choice"} == set(gates.GATES)


@pytest.mark.parametrize("sample", NAIVE)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_selection_is_the_formula(sample: str, count: int) -> None:
    gate = make(sample)
    scores_TE = gate.scores(rows(count))
    routing = gate.select(scores_TE)
    close(chosen(routing), [NAIVE[sample](h, gate) for h in scores_TE.tolist()])


def test_linear_scores_are_the_formula() -> None:
    gate = make("top_k grouped")
    x = rows(5)
    expected = [
        [
            sum(a * b for a, b in zip(row, w, strict=True)) + bias
            for w, bias in zip(gate.weight.tolist(), gate.bias.tolist(), strict=True)
        ]
        for row in x.tolist()
    ]
    torch.testing.assert_close(gate.scores(x), torch.tensor(expected))


def test_cosine_scores_are_the_formula() -> None:
    gate: Any = make("cosine")
    x = rows(5)
    projected = x @ gate.projection_weight.T + gate.projection_bias
    scale = min(math.exp(gate.log_scale.item()), 100.0)
    expected = [
        [(scale * torch.cosine_similarity(p, e, dim=0)).item() for e in gate.expert_embedding] for p in projected
    ]
    torch.testing.assert_close(gate.scores(x), torch.tensor(expected))


def test_noise_is_that_of_the_paper_and_only_in_training() -> None:
    gate: Any = make("noisy_top_k")
    x = rows(4)
    assert torch.equal(gate.scores(x), gate.clean_scores(x))
    gate.train()
    drawn = torch.stack([gate.scores(x) for _ in range(4000)]).detach()
    expected = torch.nn.functional.softplus(x @ gate.noise_weight.T)
    torch.testing.assert_close(drawn.mean(dim=0), gate.clean_scores(x).detach(), atol=0.25, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0) / expected.detach(), torch.ones_like(expected), atol=0.06, rtol=0)


@pytest.mark.parametrize("count", [1, 5, 64])
def test_expert_choice_is_the_formula(count: int) -> None:
    gate: Any = make("expert_choice")
    h = gate.scores(rows(count)).tolist()
    p = [softmax(row) for row in h]
    capacity = min(count, math.ceil(count * gate.capacity_factor / EXPERTS))
    expected: list[dict[int, float]] = [{} for _ in range(count)]
    for e in range(EXPERTS):
        for t in best([p[t][e] for t in range(count)], capacity):
            expected[t][e] = p[t][e]
    routing = gate.select(torch.tensor(h))
    close(chosen(routing), expected)
    assert routing.dropped_T is not None
    assert routing.dropped_T.tolist() == [int(not row) for row in expected]


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@MANY
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_hash_scores_are_the_formula(ids: list[int], seed: int) -> None:
    golden = 0x9E3779B97F4A7C15
    place = (golden + seed) % 2**64
    hashed = [mix((mix((x + place) % 2**64) + place) % 2**64) for x in ids]
    expected = [[(mix(row ^ mix((e + 1) * golden % 2**64)) >> 40) / 2**24 for e in range(5)] for row in hashed]
    assert gates.Hash(5, seed=seed).scores(torch.tensor(ids)).tolist() == expected
