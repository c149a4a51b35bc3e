"""What each replica is asked for a batch: one piece of work for all its experts, each row once, and who adds up.

Experts of a pack share a replica, so their rows go there in one message. Where it makes the answer smaller, the replica
adds up the weighted answers of its experts for each row (for `weighted_sum`, `residual` and `mean`).

Index arithmetic is numpy's, as in `presummed.py`.
Shapes: T rows of the batch, N pairs of the batch sorted by expert, P pairs of one piece of work, R distinct rows in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer
from ..mixture.presummed import Array, Presummed

SUMMED = ("weighted_sum", "residual", "mean")
SUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class Work:
    """Rows `x[rows_R]` for experts that share a replica; those for a pack ascend and are distinct.

    `experts` are (id, version, number of pairs). `index_P` int64 are the positions of the pairs in `rows_R`, grouped by
    expert; None for a single expert, whose pairs are the rows. With `weights_P` float the answers are added up, one row
    for each of `rows_R`. `deadline` is on the clock of the event loop, `client` whose rows they are.
    """

    experts: tuple[tuple[str, str, int], ...]
    x: Tensor
    rows_R: Tensor
    index_P: Tensor | None = None
    weights_P: Tensor | None = None
    deadline: float = math.inf
    client: str = ""

    @property
    def wanted(self) -> tuple[tuple[str, str], ...]:
        """The (expert, version) pairs that a replica must hold to do it."""
        return tuple((expert, version) for expert, version, _ in self.experts)

    @property
    def size(self) -> int:
        """Rows that cross to the replica."""
        return int(self.rows_R.shape[0])


@dataclass(frozen=True, eq=False)
class Assignment:
    """All the work of a batch, by the position of its first expert in the layer, and who does which part of it.

    `members` are the experts of a piece of work, `owner` gives its position for every expert that has rows.
    """

    handle: Dispatch
    work: Mapping[int, Work]
    members: Mapping[int, tuple[int, ...]]
    owner: Mapping[int, int]

    @cached_property
    def sums(self) -> bool:
        """Whether some replica adds up."""
        return any(work.weights_P is not None for work in self.work.values())

    @cached_property
    def places(self) -> Mapping[int, Tensor]:
        """Where replicas add up: the pairs [R] that the sums stand for, the first of each row, by piece of work."""
        found = {}
        for key, work in self.work.items():
            if work.weights_P is not None and work.index_P is not None:
                pairs = _pairs(self.handle.offsets, self.members[key])
                found[key] = torch.from_numpy(_first_pairs(pairs, work.index_P.numpy(), work.size))
        return found

    @cached_property
    def presummed(self) -> Presummed | None:
        """What became of the pairs that were added up; None where none were."""
        if not self.places:
            return None
        absorbed = [_pairs(self.handle.offsets, self.members[key]) for key in self.places]
        return Presummed.of(self.handle, absorbed, [place.numpy() for place in self.places.values()])


def assign(
    layer: Layer,
    versions: Mapping[str, str],
    x: Tensor,
    handle: Dispatch,
    *,
    deadline: float = math.inf,
    client: str = "",
) -> Assignment:
    """The work of a batch with rows `x` [T, ...]: one piece for every replica's worth of experts that has rows.

    Shared experts come last, each with all rows and by itself.
    """
    ids, offsets, rows_N = layer.expert_ids, handle.offsets, handle.rows_N.numpy()
    work: dict[int, Work] = {}
    members: dict[int, tuple[int, ...]] = {}
    for pack in layer.packs:
        present = [e for e in pack if offsets[e] < offsets[e + 1]]
        if not present:
            continue
        first = present[0]
        members[first] = tuple(present)
        experts = tuple((ids[e], versions[ids[e]], offsets[e + 1] - offsets[e]) for e in present)
        if len(present) == 1:
            work[first] = Work(experts, x, handle.rows_N[handle.pairs(first)], deadline=deadline, client=client)
            continue
        pairs = _pairs(offsets, present)
        rows_R, index_P = _distinct(rows_N[pairs], x.shape[0])
        weights_P = None
        if _pays(layer, x, len(rows_R), len(index_P)):
            weights_P = term_weights(layer, handle, pairs)
        rows, index = torch.from_numpy(rows_R), torch.from_numpy(index_P)
        work[first] = Work(experts, x, rows, index, weights_P, deadline, client)
    if x.shape[0] and layer.shared_ids:
        every = torch.arange(x.shape[0])
        for position, shared in enumerate(layer.shared_ids, start=len(layer.experts)):
            whole = ((shared, versions[shared], x.shape[0]),)
            work[position] = Work(whole, x, every, deadline=deadline, client=client)
            members[position] = (position,)
    owner = {expert: first for first, together in members.items() for expert in together}
    return Assignment(handle, work, members, owner)


def _pays(layer: Layer, x: Tensor, rows: int, pairs: int) -> bool:
    """Whether a float32 sum for each row is less to send than an answer for each pair, in the dtype of the rows."""
    narrow = x.element_size() if x.is_floating_point() else SUM_BYTES
    return layer.combine in SUMMED and rows < pairs and rows * SUM_BYTES <= pairs * narrow


def _pairs(offsets: Sequence[int], experts: Sequence[int]) -> Array | slice:
    """The pairs of some experts, ascending: a slice where nobody else's lie between them."""
    first, last = offsets[experts[0]], offsets[experts[-1] + 1]
    if sum(offsets[e + 1] - offsets[e] for e in experts) == last - first:
        return slice(first, last)
    return np.concatenate([np.arange(offsets[e], offsets[e + 1]) for e in experts])


def _distinct(rows_P: Array, num_rows: int) -> tuple[Array, Array]:
    """The distinct rows, ascending [R], and where in them the row of each pair stands [P]."""
    held_T = np.zeros(num_rows, dtype=bool)
    held_T[rows_P] = True
    rows_R = held_T.nonzero()[0]
    places_T = np.empty(num_rows, dtype=np.int64)
    places_T[rows_R] = np.arange(len(rows_R))
    return rows_R, places_T[rows_P]


def term_weights(layer: Layer, handle: Dispatch, pairs: Array | slice) -> Tensor:
    """What the answers to some pairs are multiplied with in the sum of their row: [P], float."""
    at = pairs if isinstance(pairs, slice) else torch.from_numpy(pairs)
    if layer.combine != "mean":
        return handle.weights_N[at]
    held_T = torch.bincount(handle.rows_N, minlength=handle.num_rows)
    return held_T[handle.rows_N[at]].float().reciprocal()


def _first_pairs(pairs: Array | slice, index_P: Array, rows: int) -> Array:
    """The first of the pairs of each distinct row, in the order of the experts: [R]."""
    order_P = np.arange(pairs.start, pairs.stop) if isinstance(pairs, slice) else pairs
    first_R = np.empty(rows, dtype=np.int64)
    first_R[index_P[::-1]] = order_P[::-1]  # of equal indices the last one stays
    return first_R
