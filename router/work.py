"""What each replica is asked for a batch: one piece of work for all its experts, each row once, and who adds up.

Experts of a pack share a replica, so their rows go there in one message. Where it makes the answer smaller, the replica
adds up the weighted answers of its experts for each row (for `weighted_sum`, `residual` and `mean`).

Shapes: T rows of the batch, N pairs of the batch sorted by expert, P pairs of one piece of work, R distinct rows in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Dispatch
from .layer import Layer
from .presummed import Presummed

SUMMED = ("weighted_sum", "residual", "mean")
SUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class Work:
    """Rows `x[rows_R]` for experts that share a replica.

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

    `members` are the experts of a piece of work, `owner` gives its position for every expert that has rows. Where
    replicas add up, `places` gives the pairs [R] that the sums stand for, `presummed` what became of the others.
    """

    work: Mapping[int, Work]
    members: Mapping[int, tuple[int, ...]]
    owner: Mapping[int, int]
    places: Mapping[int, Tensor]
    presummed: Presummed | None = None


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
    ids, offsets = layer.expert_ids, handle.offsets
    work: dict[int, Work] = {}
    members: dict[int, tuple[int, ...]] = {}
    places: dict[int, Tensor] = {}
    absorbed: list[Tensor] = []
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
        pairs_P = torch.cat([torch.arange(offsets[e], offsets[e + 1]) for e in present])
        rows_R, index_P = torch.unique(handle.rows_N[pairs_P], return_inverse=True)
        weights_P = None
        if _pays(layer, x, rows_R.shape[0], pairs_P.shape[0]):
            weights_P = _weights(layer, handle, pairs_P)
            places[first] = _first_pairs(pairs_P, index_P, rows_R.shape[0])
            absorbed.append(pairs_P)
        work[first] = Work(experts, x, rows_R, index_P, weights_P, deadline, client)
    if x.shape[0]:
        every = torch.arange(x.shape[0])
        for position, shared in enumerate(layer.shared_ids, start=len(layer.experts)):
            whole = ((shared, versions[shared], x.shape[0]),)
            work[position] = Work(whole, x, every, deadline=deadline, client=client)
            members[position] = (position,)
    owner = {expert: first for first, together in members.items() for expert in together}
    return Assignment(work, members, owner, places, _presummed(handle, absorbed, places))


def _pays(layer: Layer, x: Tensor, rows: int, pairs: int) -> bool:
    """Whether a float32 sum for each row is less to send than an answer for each pair, in the dtype of the rows."""
    narrow = x.element_size() if x.is_floating_point() else SUM_BYTES
    return layer.combine in SUMMED and rows < pairs and rows * SUM_BYTES <= pairs * narrow


def _weights(layer: Layer, handle: Dispatch, pairs_P: Tensor) -> Tensor:
    if layer.combine != "mean":
        return handle.weights_N[pairs_P]
    held_T = torch.bincount(handle.rows_N, minlength=handle.num_rows)
    return held_T[handle.rows_N[pairs_P]].float().reciprocal()


def _first_pairs(pairs_P: Tensor, index_P: Tensor, rows: int) -> Tensor:
    """The first of the pairs of each distinct row, in the order of the experts: [R]."""
    order_P = torch.arange(pairs_P.shape[0])
    first_R = torch.full((rows,), pairs_P.shape[0], dtype=torch.int64).scatter_reduce_(0, index_P, order_P, "amin")
    return pairs_P[first_R]


def _presummed(handle: Dispatch, absorbed: list[Tensor], places: Mapping[int, Tensor]) -> Presummed | None:
    if not places:
        return None
    first_N = torch.zeros(handle.num_pairs, dtype=torch.bool)
    absorbed_N = torch.zeros(handle.num_pairs, dtype=torch.bool)
    first_N[torch.cat(list(places.values()))] = True
    absorbed_N[torch.cat(absorbed)] = True
    return Presummed(first_N, absorbed_N & ~first_N)
