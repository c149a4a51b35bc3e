"""Capacity against its definition: which choices are kept, and what counts as dropped."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import ConfigError
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.capacity import DROP, Capacity

EXPERTS = 4


def sample(count: int, k: int, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    indices_TK = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :k]
    weights_TK = (torch.rand(count, k, generator=generator) * 4).round() / 4  # with ties
    empty_TK = torch.rand(count, k, generator=generator) < 0.2
    return Routing(indices_TK.masked_fill(empty_TK, -1), weights_TK.masked_fill(empty_TK, 0))


@pytest.mark.parametrize("drop", DROP)
@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 30),
    k=st.integers(1, EXPERTS),
    seed=st.integers(0, 99),
    factor=st.sampled_from([0.25, 0.5, 1, 2]),
)
def test_each_expert_keeps_the_first_or_the_heaviest(drop: str, count: int, k: int, seed: int, factor: float) -> None:
    routing = sample(count, k, seed)
    capacity = Capacity(factor=factor, drop=drop)
    limited = capacity.apply(routing, EXPERTS)
    choices = int((routing.indices_TK >= 0).sum())
    limit = max(1, math.ceil(factor * choices / EXPERTS))
    assert capacity.rows(choices, EXPERTS) == limit
    kept = set()
    for expert in range(EXPERTS):
        rows, columns = (routing.indices_TK == expert).nonzero(as_tuple=True)
        candidates = list(zip(rows.tolist(), columns.tolist(), strict=True))
        if drop == "probability":
            candidates.sort(key=lambda place: (-float(routing.weights_TK[place]), place[0]))
        kept |= set(candidates[:limit])
    for place in [(t, j) for t in range(count) for j in range(k)]:
        expected = int(routing.indices_TK[place]) if place in kept else -1
        assert int(limited.indices_TK[place]) == expected
        assert float(limited.weights_TK[place]) == (float(routing.weights_TK[place]) if place in kept else 0.0)
    dropped = ((routing.indices_TK >= 0) & (limited.indices_TK < 0)).sum(dim=1)
    assert limited.dropped_T is not None
    assert torch.equal(limited.dropped_T, dropped)


def test_choices_that_the_gate_dropped_are_counted_too() -> None:
    routing = Routing(torch.tensor([[0], [0], [-1]]), torch.ones(3, 1), torch.tensor([0, 0, 1]))
    limited = Capacity(factor=0.5).apply(routing, 2)
    assert limited.dropped_T is not None
    assert limited.dropped_T.tolist() == [0, 1, 1]
    assert limited.unrouted_T.tolist() == [False, True, True]


@pytest.mark.parametrize(
    "arguments", [{"factor": 0}, {"factor": math.nan}, {"factor": 1, "drop": "last"}, {"factor": 1, "minimum": -1}]
)
def test_invalid_values_are_rejected(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        Capacity(**arguments)  # type: ignore[arg-type]
