"""The work of a batch: one piece for each pack or single expert, with each row once, and with sums where they pay.

Experts of a pack share a replica, so their rows go there in one message. If it makes the answers smaller, replicas add
up the weighted answers of their experts for each row (for `weighted_sum`, `residual` and `mean`).

Index arithmetic on few rows uses numpy, whose calls cost a third of torch's.
Shapes: T rows of the batch, N pairs of the batch sorted by expert, P pairs of one piece of work, R distinct rows in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer

Array = np.ndarray[Any, Any]
SUMMED = ("weighted_sum", "residual", "mean")
SUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class Work:
    """Rows `x[rows_R]` for experts that share a replica; the rows of a pack are distinct and ascending.

    `experts` are (id, version, number of pairs). `index_P` int64 are the positions of the pairs in `rows_R`, grouped by
    expert; None for a single expert, whose pairs are the rows. With `weights_P` (float) the replica adds the answers
    up, into one row for each of `rows_R`. `deadline` is in event-loop time; `client` sent the rows ("" for several).
    `merged` rows come from several requests.
    """

    experts: tuple[tuple[str, str, int], ...]
    x: Tensor
    rows_R: Tensor
    index_P: Tensor | None = None
    weights_P: Tensor | None = None
    deadline: float = math.inf
    client: str = ""
    merged: bool = False

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """The (expert, version) pairs that a replica must hold to do the work."""
        return tuple((expert, version) for expert, version, _ in self.experts)

    @property
    def size(self) -> int:
        """The number of rows that are sent to the replica."""
        return int(self.rows_R.shape[0])


@dataclass(frozen=True, eq=False)
class Assignment:
    """All the work of a batch, by a key: the position of its first expert in the layer.

    `members` are the experts of each piece of work, `owner` is the key of the work of each expert that has rows. With
    `sums` every piece of work is answered with sums, except that of shared experts.
    """

    handle: Dispatch
    work: Mapping[int, Work]
    members: Mapping[int, tuple[int, ...]]
    owner: Mapping[int, int]
    sums: bool


def assign(
    layer: Layer,
    versions: Mapping[str, str],
    x: Tensor,
    handle: Dispatch,
    *,
    deadline: float = math.inf,
    client: str = "",
    merged: bool = False,
) -> Assignment:
    """Split a batch with rows `x` [T, ...] into work: one piece for each pack or single expert that has rows.

    Shared experts come last, each in a piece of its own with all rows.
    """
    ids, offsets, rows_N = layer.expert_ids, handle.offsets, handle.rows_N.numpy()
    present = [experts for pack in layer.packs if (experts := _with_rows(pack, offsets))]
    pairs = [_pairs(offsets, experts) for experts in present]
    rows = [
        _distinct(rows_N[own], x.shape[0]) if len(experts) > 1 else (rows_N[own], None)
        for experts, own in zip(present, pairs, strict=True)
    ]
    sums = _sums_are_smaller(layer, x, sum(len(rows_R) for rows_R, _ in rows), handle.num_pairs)
    weights_N = term_weights(layer, handle) if sums else None
    work: dict[int, Work] = {}
    for experts, own, (rows_R, index_P) in zip(present, pairs, rows, strict=True):
        work[experts[0]] = Work(
            tuple((ids[e], versions[ids[e]], offsets[e + 1] - offsets[e]) for e in experts),
            x,
            torch.from_numpy(rows_R),
            None if index_P is None else torch.from_numpy(index_P),
            None if weights_N is None else weights_N[own],
            deadline,
            client,
            merged,
        )
    members = {experts[0]: experts for experts in present}
    if x.shape[0] and layer.shared_ids:
        all_rows = torch.arange(x.shape[0])
        for position, shared in enumerate(layer.shared_ids, start=len(layer.experts)):
            part = ((shared, versions[shared], x.shape[0]),)
            work[position] = Work(part, x, all_rows, deadline=deadline, client=client, merged=merged)
            members[position] = (position,)
    owner = {expert: key for key, experts in members.items() for expert in experts}
    return Assignment(handle, work, members, owner, sums)


def term_weights(layer: Layer, handle: Dispatch) -> Tensor:
    """The factor of each pair's answer in the sum of its row: float [N]."""
    if layer.combine != "mean":
        return handle.weights_N
    pairs_T = torch.bincount(handle.rows_N, minlength=handle.num_rows)
    return pairs_T[handle.rows_N].float().reciprocal()


def _with_rows(experts: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    return tuple(e for e in experts if offsets[e] < offsets[e + 1])


def _sums_are_smaller(layer: Layer, x: Tensor, rows: int, pairs: int) -> bool:
    """Whether a float32 sum for each row takes fewer bytes than an answer, in the dtype of the rows, for each pair."""
    answer_bytes = x.element_size() if x.is_floating_point() else SUM_BYTES
    return layer.combine in SUMMED and rows < pairs and rows * SUM_BYTES <= pairs * answer_bytes


def _pairs(offsets: Sequence[int], experts: Sequence[int]) -> Array | slice:
    """The pairs of some experts, ascending: a slice if they are contiguous."""
    first, last = offsets[experts[0]], offsets[experts[-1] + 1]
    if sum(offsets[e + 1] - offsets[e] for e in experts) == last - first:
        return slice(first, last)
    return np.concatenate([np.arange(offsets[e], offsets[e + 1]) for e in experts])


def _distinct(rows_P: Array, num_rows: int) -> tuple[Array, Array]:
    """The distinct rows, ascending [R], and the position of each pair's row among them [P]."""
    used_T = np.zeros(num_rows, dtype=bool)
    used_T[rows_P] = True
    rows_R = used_T.nonzero()[0]
    positions_T = np.empty(num_rows, dtype=np.int64)
    positions_T[rows_R] = np.arange(len(rows_R))
    return rows_R, positions_T[rows_P]
