"""Several pieces of work in one message to a replica, and the place of their answers in the reply.

Shapes: R rows and N pairs of the message, P pairs of one piece of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import BY_NAME, DataLoss, ExpertMeshError, VersionGone
from ...experts.protocol import ExpertCall, ExpertReply, Part, PartFailure, PartialSum
from .answers import Answered
from .work import Work


@dataclass(frozen=True)
class Place:
    """The parts and the sum of a reply, and the pairs of the message, that belong to one piece of work.

    `all_parts` and `all_sums` are the numbers of parts and sums of the whole message.
    """

    parts: slice
    pairs: slice
    sum: int | None
    all_parts: int
    all_sums: int

    def lost(self, lost: Tensor | None) -> Tensor | None:
        """The pairs of the work, counted from its first one, among the lost pairs of the message."""
        if lost is None:
            return None
        own = lost[(lost >= self.pairs.start) & (lost < self.pairs.stop)] - self.pairs.start
        return own if own.numel() else None


def build_call(attempt: int, works: Sequence[Work], *, now: float) -> tuple[ExpertCall, list[Place]]:
    """Build one message from several pieces of work, with each row of a piece once. `now` is in event-loop time."""
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


def answer_at(place: Place, reply: ExpertReply) -> Answered | ExpertMeshError:
    """The part of a reply that belongs to one piece of work of its message."""
    if len(reply.outputs) != place.all_parts or len(reply.sums) != place.all_sums:
        return DataLoss(f"a replica answered {len(reply.outputs)} of {place.all_parts} parts of a message")
    outputs = tuple(_output(output) for output in reply.outputs[place.parts])
    version_gone = next((output for output in outputs if isinstance(output, VersionGone)), None)
    if version_gone is not None:  # one replica must do the whole job
        return version_gone
    if place.sum is None:
        return Answered(outputs)
    total = _output(reply.sums[place.sum])
    if isinstance(total, ExpertMeshError):
        failed = all(isinstance(output, ExpertMeshError) for output in outputs)
        return Answered(outputs) if failed else total
    return Answered(outputs, total, place.lost(reply.lost))


def same_kind(one: Work, other: Work) -> bool:
    """Whether the rows of two pieces of work fit in one tensor."""
    return one.x.dtype == other.x.dtype and one.x.shape[1:] == other.x.shape[1:]


def _rows(work: Work) -> Tensor:
    """The rows of a piece of work; not a copy if a pack takes all rows, since its replica copies them per expert."""
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
    """The weights of all pairs; 0, which is never read, for pairs that are not added up."""
    weights = [work.weights_P for work in works]
    dtype = torch.float64 if any(w is not None and w.dtype == torch.float64 for w in weights) else torch.float32
    counts = [sum(size for _, _, size in work.experts) for work in works]
    return _joined(
        [torch.zeros(n, dtype=dtype) if w is None else w.to(dtype) for w, n in zip(weights, counts, strict=True)]
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _output(output: Tensor | PartFailure | None) -> Tensor | ExpertMeshError | None:
    if isinstance(output, PartFailure):
        return BY_NAME.get(output.error, ExpertMeshError)(output.message)
    return output
