"""Several pieces of work as one message to a replica, and where in the reply each finds its own answer.

Shapes: R rows and N pairs of the message, P pairs of one piece of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.protocol import ExpertCall, Part, PartialSum
from .work import Work


@dataclass(frozen=True)
class Place:
    """Which parts and which sum of a reply belong to one piece of work, and which pairs of the message were its own."""

    parts: slice
    pairs: slice
    sum: int | None
    all_parts: int
    all_sums: int

    def lost(self, lost: Tensor | None) -> Tensor | None:
        """The pairs of the work, counted from its first, among those of the message that were lost."""
        if lost is None:
            return None
        own = lost[(lost >= self.pairs.start) & (lost < self.pairs.stop)] - self.pairs.start
        return own if own.numel() else None


def build_call(attempt: int, works: Sequence[Work], *, now: float) -> tuple[ExpertCall, list[Place]]:
    """One message for some work, in which each row of a piece of work stands once. `now` is on the deadlines' clock."""
    plain = all(work.index_P is None for work in works)
    summed = any(work.weights_P is not None for work in works)
    parts: list[Part] = []
    sums: list[PartialSum] = []
    places: list[tuple[slice, slice, int | None]] = []
    pairs = rows = 0
    for work in works:
        first, begin = len(parts), pairs
        for expert, version, size in work.experts:
            parts.append(Part(expert, version, pairs, pairs + size))
            pairs += size
        if work.weights_P is not None:
            sums.append(PartialSum(first, len(parts), rows, rows + work.size))
        rows += work.size
        own_sum = len(sums) - 1 if work.weights_P is not None else None
        places.append((slice(first, len(parts)), slice(begin, pairs), own_sum))
    call = ExpertCall(
        attempt,
        tuple(parts),
        _joined([_rows(work) for work in works]),
        None if plain else _index(works),
        _weights(works) if summed else None,
        tuple(sums),
        timeout=max(work.deadline for work in works) - now,
    )
    return call, [Place(*place, all_parts=len(parts), all_sums=len(sums)) for place in places]


def alike(one: Work, other: Work) -> bool:
    """Whether the rows of two pieces of work can stand in one tensor."""
    return one.x.dtype == other.x.dtype and one.x.shape[1:] == other.x.shape[1:]


def _rows(work: Work) -> Tensor:
    """The rows of a piece of work. Not a copy where a pack takes all rows: its replica copies them for each expert."""
    if work.index_P is not None and work.size == work.x.shape[0]:
        return work.x
    return work.x.index_select(0, work.rows_R)


def _index(works: Sequence[Work]) -> Tensor:
    offset, indices = 0, []
    for work in works:
        own = torch.arange(work.size) if work.index_P is None else work.index_P
        indices.append(own + offset if offset else own)
        offset += work.size
    return _joined(indices)


def _weights(works: Sequence[Work]) -> Tensor:
    """The weights of all pairs; those of pairs that are not added up are never read."""
    given = [work.weights_P for work in works]
    dtype = torch.float64 if any(w is not None and w.dtype == torch.float64 for w in given) else torch.float32
    counts = [sum(size for _, _, size in work.experts) for work in works]
    return _joined(
        [torch.zeros(n, dtype=dtype) if w is None else w.to(dtype) for w, n in zip(given, counts, strict=True)]
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
