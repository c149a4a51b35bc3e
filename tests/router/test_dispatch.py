"""Dispatch against its definition: pairs sorted by expert, then row, and slots that point back to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import InvalidRequest
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.dispatch import dispatch

EXPERTS = 5
MANY = settings(max_examples=80, deadline=None)


@st.composite
def routings(draw: st.DrawFn, holes: bool = True) -> Routing:
    count, k = draw(st.integers(0, 20)), draw(st.integers(1, EXPERTS))
    rows = []
    for _ in range(count):
        experts = draw(st.permutations(range(EXPERTS)))[:k]
        rows.append([-1 if holes and draw(st.booleans()) else e for e in experts])
    indices_TK = torch.tensor(rows, dtype=torch.int64).reshape(count, k)
    weights_TK = torch.rand(count, k).masked_fill(indices_TK < 0, 0)
    return Routing(indices_TK, weights_TK)


@MANY
@given(routing=routings() | routings(holes=False))
def test_pairs_and_slots_are_as_defined(routing: Routing) -> None:
    handle = dispatch(routing, EXPERTS)
    expected = sorted(
        (expert, row, weight)
        for row, (experts, weights) in enumerate(
            zip(routing.indices_TK.tolist(), routing.weights_TK.tolist(), strict=True)
        )
        for expert, weight in zip(experts, weights, strict=True)
        if expert >= 0
    )
    experts_N = [handle.expert_of(slot) for slot in range(handle.num_pairs)]
    assert list(zip(experts_N, handle.rows_N.tolist(), handle.weights_N.tolist(), strict=True)) == expected
    assert handle.offsets[0] == 0
    assert handle.offsets[-1] == handle.num_pairs == len(expected)
    assert [pair for e in range(EXPERTS) for pair in range(handle.num_pairs)[handle.pairs(e)]] == list(
        range(len(expected))
    )
    for row, slots in enumerate(handle.slots_TK.tolist()):
        held = [slot for slot in slots if slot >= 0]
        assert held == [slot for slot, pair in enumerate(expected) if pair[1] == row]
        assert sorted(slots) == slots
    assert handle.full == (routing.indices_TK >= 0).all()


@MANY
@given(routing=routings(), data=st.data())
def test_a_slice_is_the_part_of_one_request(routing: Routing, data: st.DataObject) -> None:
    handle = dispatch(routing, EXPERTS)
    start = data.draw(st.integers(0, handle.num_rows))
    stop = data.draw(st.integers(start, handle.num_rows))
    part = handle.slice(start, stop)
    assert part.num_rows == stop - start
    assert torch.equal(part.slots_TK, handle.slots_TK[start:stop])
    assert part.num_pairs == handle.num_pairs
    assert part.experts() == tuple(sorted(set(routing.indices_TK[start:stop].flatten().tolist()) - {-1}))


def test_without_removes_slots() -> None:
    handle = dispatch(Routing(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)), EXPERTS)
    fewer = handle.without(torch.tensor([[True, False], [False, False]]))
    assert fewer.slots_TK.tolist() == [[-1, 1], [2, 3]]
    assert not fewer.full


def test_an_expert_that_does_not_exist_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="expert 5"):
        dispatch(Routing(torch.tensor([[0, 5]]), torch.ones(1, 2)), EXPERTS)
