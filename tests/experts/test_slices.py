"""Gradients of slices: whatever is packed comes back, and sums are those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import InvalidRequest
from expertmesh.experts.training.slices import added, pack, seed_of_slice, unpack

SHAPES = ((3, 2), (4,), (), (0, 5))
PARAMETERS = [torch.zeros(shape) for shape in SHAPES]
given_or_none = st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES))


def gradients(present: list[bool], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    drawn = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=drawn, dtype=dtype) if own else None
        for shape, own in zip(SHAPES, present, strict=True)
    ]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)


@given(given_or_none, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_what_is_packed_comes_back(present: list[bool], dtype: torch.dtype) -> None:
    wanted = gradients(present, 1, dtype)
    assert same(unpack(pack(wanted), [parameter.to(dtype) for parameter in PARAMETERS]), wanted)


@given(st.lists(given_or_none, min_size=1, max_size=4))
def test_the_sum_is_in_the_order_of_the_slices(slices: list[list[bool]]) -> None:
    parts = [gradients(present, number) for number, present in enumerate(slices)]
    wanted: list[Tensor | None] = [None] * len(SHAPES)
    for part in parts:
        for at, gradient in enumerate(part):
            before = wanted[at]
            if gradient is not None:
                wanted[at] = gradient if before is None else before + gradient
    assert same(unpack(added(map(pack, parts)), PARAMETERS), wanted)


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        (torch.zeros(6), torch.tensor([[0, 5]])),
        (torch.zeros(6), torch.tensor([[9, 6]])),
        (torch.zeros(6), torch.tensor([[0, 7], [1, -1]])),
        (torch.zeros(2, 3), torch.tensor([[0, 6]])),
        (torch.zeros(6), torch.tensor([[0.0, 6.0]])),
        (torch.zeros(5), torch.tensor([[0, 5]])),
    ],
)
def test_gradients_of_another_expert_are_refused(values: Tensor, sizes: Tensor) -> None:
    with pytest.raises(InvalidRequest):
        unpack((values, sizes), PARAMETERS)


def test_slices_draw_different_numbers_and_the_first_those_of_the_pass() -> None:
    assert len({seed_of_slice(7, number) for number in range(100)}) == 100
    assert seed_of_slice(7, 0) == 7
