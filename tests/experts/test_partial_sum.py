"""Weighted sums where experts run: exact, in expert order, without what failed or is not finite, and told so."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.protocol import ExpertCall, Part, PartFailure, PartialSum
from expertmesh.experts.sums.partial_sum import add_up

D = 3


@st.composite
def messages(draw: Any) -> tuple[ExpertCall, list[Tensor | PartFailure]]:
    """Work for one or two requests, each a few experts over a few rows, some of which fail or answer NaN."""
    parts: list[Part] = []
    sums: list[PartialSum] = []
    index: list[int] = []
    outputs: list[Tensor | PartFailure] = []
    rows = 0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    for _ in range(draw(st.integers(1, 2))):
        size, first = draw(st.integers(1, 5)), len(parts)
        for expert in range(draw(st.integers(1, 4))):
            chosen = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
            parts.append(Part(f"l/e{expert}", "v1", len(index), len(index) + len(chosen)))
            index += [rows + row for row in chosen]
            values = [[float(draw(st.integers(-8, 8)))] * D for _ in chosen]
            if draw(st.integers(0, 5)) == 0:
                values[0][1] = draw(st.sampled_from([math.nan, math.inf]))
            failed = draw(st.integers(0, 5)) == 0
            outputs.append(PartFailure("ExpertFailed", "it raised") if failed else torch.tensor(values).to(dtype))
        sums.append(PartialSum(first, len(parts), rows, rows + size))
        rows += size
    weights = torch.tensor([draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])) for _ in index])  # exact in any order
    call = ExpertCall(1, tuple(parts), torch.zeros(rows, D), torch.tensor(index), weights, tuple(sums))
    return call, outputs


@given(message=messages())
@settings(max_examples=150, deadline=None)
def test_sums_are_those_of_a_loop_over_pairs(message: tuple[ExpertCall, list[Tensor | PartFailure]]) -> None:
    call, outputs = message
    sums, lost = add_up(call, outputs)
    bad = []
    for asked, total in zip(call.sums, sums, strict=True):
        answered = [at for at in range(asked.first, asked.last) if isinstance(outputs[at], Tensor)]
        if not answered:
            assert total is outputs[asked.first]
            continue
        wanted = torch.zeros(asked.stop - asked.start, D, dtype=torch.float64)
        for at in answered:
            for place, row in enumerate(outputs[at]):
                pair = call.parts[at].start + place
                if bool(row.isfinite().all()):
                    wanted[int(call.row_index[pair]) - asked.start] += row.double() * float(call.weights[pair])
                else:
                    bad.append(pair)
        assert torch.equal(total.double(), wanted)
        assert total.dtype == (torch.float64 if outputs[answered[0]].dtype == torch.float64 else torch.float32)
    assert ([] if lost is None else sorted(lost.tolist())) == sorted(bad)


def test_the_order_is_that_of_the_experts() -> None:
    """1e8 + 1 - 1e8 in float32 is 0 from left to right: only that order gives this."""
    parts = tuple(Part(f"l/e{n}", "v1", n, n + 1) for n in range(3))
    call = ExpertCall(1, parts, torch.zeros(1, 1), torch.tensor([0, 0, 0]), torch.ones(3), (PartialSum(0, 3, 0, 1),))
    sums, lost = add_up(call, [torch.tensor([[value]]) for value in (1e8, 1.0, -1e8)])
    assert float(sums[0]) == 0.0
    assert lost is None
    sums, _ = add_up(call, [torch.tensor([[value]]) for value in (1e8, -1e8, 1.0)])
    assert float(sums[0]) == 1.0
