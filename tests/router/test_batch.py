"""A batch: answers reach their places in any order of arrival, and the last release cancels unfinished work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from helpers.waiting import run_async
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import SpecMismatch, Unavailable
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.fanout.answers import Answered
from expertmesh.router.fanout.batch import Batch
from expertmesh.router.fanout.work import assign
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.dispatch import dispatch
from expertmesh.router.mixture.layer import Layer

E = 3
LAYER = Layer("l", gates.Fixed([1.0] * E), {f"e{number}": Expert("torch:sin") for number in range(E)})


def batch_of(indices: list[list[int]]) -> Batch:
    indices_TK = torch.tensor(indices)
    routing = Routing(indices_TK, torch.ones(indices_TK.shape))
    handle = dispatch(routing, E)
    x = torch.arange(float(len(indices)))[:, None]
    assignment = assign(LAYER, dict.fromkeys(LAYER.expert_ids, "v1"), x, handle)
    return Batch(Epoch(1), LAYER, x, routing, handle, assignment)


def answer(batch: Batch, expert: int, dtype: torch.dtype = torch.float32) -> Answered:
    rows = batch.handle.rows_N[batch.handle.pairs(expert)]
    return Answered(((batch.x[rows] * 10 + expert).to(dtype),))


choices = st.lists(st.permutations(range(E)).map(lambda order: order[:2]), min_size=1, max_size=6)


@given(indices=choices, order=st.permutations(range(E)), failing=st.sets(st.integers(0, E - 1)), data=st.data())
@settings(max_examples=80, deadline=None)
def test_each_request_reads_its_own_answers(
    indices: list[list[int]], order: list[int], failing: set[int], data: Any
) -> None:
    cut = data.draw(st.integers(0, len(indices)))

    async def main() -> None:
        batch = batch_of(indices)
        for expert in order:
            if expert in batch.assignment.work and expert in failing:
                batch.answer(expert, Unavailable("down"))
            elif expert in batch.assignment.work:
                batch.answer(expert, answer(batch, expert))
        for start, stop in ((0, cut), (cut, len(indices))):
            handle = batch.handle.slice(start, stop)
            experts = handle.experts()
            failed = await batch.wait(experts)
            assert set(failed) == {expert for expert in experts if expert in failing}
            outputs_N, answered_N = batch.answers.outputs(experts), batch.answers.answered(experts)
            assert (answered_N is None) == (not failed)
            for row in range(start, stop):
                for slot in handle.slots_TK[row - start].tolist():
                    expert = handle.expert_of(slot)
                    assert answered_N is None or bool(answered_N[slot]) == (expert not in failing)
                    if expert not in failing:
                        assert outputs_N is not None
                        assert outputs_N[slot].tolist() == [row * 10 + expert]

    run_async(main())


def test_different_dtypes_are_promoted_and_different_shapes_rejected() -> None:
    async def main() -> None:
        batch = batch_of([[0, 1], [1, 2]])
        batch.answer(0, answer(batch, 0, torch.float16))
        batch.answer(1, answer(batch, 1, torch.float64))
        batch.answer(2, Answered((torch.zeros(1, 2),)))
        outputs_N = batch.answers.outputs((0, 1))
        assert outputs_N is not None
        assert outputs_N.dtype == torch.float64
        assert outputs_N[:3].flatten().tolist() == [0.0, 1.0, 11.0]
        with pytest.raises(SpecMismatch, match=r"l/e2 answers with rows of shape \[2\], another expert .* with \[1\]"):
            batch.answers.outputs((1, 2))

    run_async(main())


def test_there_are_no_outputs_without_answers_or_without_experts() -> None:
    async def main() -> None:
        batch = batch_of([[0, 1]])
        assert await batch.wait(()) == {}
        assert (batch.answers.outputs(()), batch.answers.answered(())) == (None, None)
        batch.answer(0, Unavailable("down"))
        batch.answer(1, Unavailable("down"))
        outputs_N, answered_N = batch.answers.outputs((0, 1)), batch.answers.answered((0, 1))
        assert outputs_N is None
        assert answered_N is not None
        assert not answered_N.any()

    run_async(main())


def test_waiting_for_some_experts_does_not_wait_for_the_others() -> None:
    async def main() -> None:
        batch = batch_of([[0, -1], [1, 2]])
        batch.answer(0, answer(batch, 0))
        assert await batch.wait((0,)) == {}
        waiting = asyncio.ensure_future(batch.wait((1, 2)))
        batch.answer(1, answer(batch, 1))
        await asyncio.sleep(0)
        assert not waiting.done()
        batch.answer(2, Unavailable("down"))
        assert set(await waiting) == {2}

    run_async(main())


@given(holders=st.integers(0, 5), answered=st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_last_release_cancels_unfinished_work(holders: int, answered: bool) -> None:
    async def main() -> None:
        events: list[str] = []
        batch = batch_of([[0, 1]])
        batch.cancel = lambda: events.append("cancelled")
        batch.when_complete(lambda: events.append("complete"))
        batch.answer(0, answer(batch, 0))
        if answered:
            batch.answer(1, answer(batch, 1))
        for _ in range(holders):
            batch.hold()
        for _ in range(holders):
            batch.release()
            assert events == (["complete"] if answered else [])
        batch.release()
        assert events == (["complete"] if answered else ["cancelled", "complete"])

    run_async(main())


def packed_batch(indices: list[list[int]]) -> tuple[Batch, Answered]:
    """A batch with a replica for e0 and e1 whose sums are 10, one for e2 with sums 1, 2, ...; and the first answer."""
    names = {"e0": "p", "e1": "p", "e2": None}
    layer = Layer("l", gates.Fixed([1.0] * E), {name: Expert("torch:sin", pack=pack) for name, pack in names.items()})
    indices_TK = torch.tensor(indices)
    routing = Routing(indices_TK, torch.ones(indices_TK.shape))
    handle, x = dispatch(routing, E), torch.zeros(len(indices), 1)
    assignment = assign(layer, dict.fromkeys(layer.expert_ids, "v1"), x, handle)
    batch = Batch(Epoch(1), layer, x, routing, handle, assignment)
    sums = Answered((None, None), torch.full((assignment.work[0].size, 1), 10.0))
    batch.answer(0, sums)
    if 2 in assignment.work:
        batch.answer(2, Answered((None,), torch.arange(1.0, 1 + assignment.work[2].size)[:, None]))
    return batch, sums


def test_a_row_that_an_expert_has_twice_counts_twice() -> None:
    batch, _ = packed_batch([[2, 2], [0, 1]])
    total = batch.answers.total((0, 1, 2), 0, 2)
    assert total is not None
    assert total.tolist() == [[3.0], [10.0]]


def test_the_sum_in_a_message_is_never_written_to_and_a_part_does_not_keep_it() -> None:
    batch, sums = packed_batch([[0, 1], [0, 1], [0, 1]])
    part = batch.answers.total((0, 1), 1, 2)
    assert part is not None
    assert sums.total is not None
    assert part.untyped_storage().data_ptr() != sums.total.untyped_storage().data_ptr()
    batch, sums = packed_batch([[0, 1, 2], [0, 1, 2]])
    total = batch.answers.total((0, 1, 2), 0, 2)
    assert total is not None
    assert total.tolist() == [[11.0], [12.0]]
    assert sums.total is not None
    assert sums.total.tolist() == [[10.0], [10.0]]
