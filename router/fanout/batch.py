"""A batch on its way: work for replicas, one buffer for the answers, and requests that each wait for their part.

Shapes: T rows, N pairs of a row and an expert, sorted by expert, then by row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...experts.errors import ExpertMeshError, SpecMismatch
from ..epochs.epochs import Epoch
from ..gates import Routing
from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer
from .work import Assignment, term_weights


@dataclass(frozen=True, eq=False)
class Answered:
    """What came of one piece of work: its experts' rows, each [pairs, ...], or why there are none.

    Where they were added up, `total` [R, ...] is their sum, `outputs` None, and `lost` int64 are the pairs of the work
    that are not in it because their answer was not finite.
    """

    outputs: tuple[Tensor | ExpertMeshError | None, ...]
    total: Tensor | None = None
    lost: Tensor | None = None


@dataclass(eq=False)
class Batch:
    """Rows `x` [T, ...] of one layer on one epoch, and the answers of its experts as they come in.

    The batch is held by those who wait for it; when the last one lets go, work that is left is given up by `cancel`.
    """

    epoch: Epoch
    layer: Layer
    x: Tensor
    routing: Routing
    handle: Dispatch
    assignment: Assignment
    cancel: Callable[[], None] = lambda: None
    _answers: dict[int, Answered | ExpertMeshError] = field(default_factory=dict)
    _waiting: list[tuple[set[int], asyncio.Future[None]]] = field(default_factory=list)
    _complete: list[Callable[[], None]] = field(default_factory=list)
    _holders: int = 1
    _stored: set[int] = field(default_factory=set)
    _outputs_N: Tensor | None = None

    def hold(self) -> None:
        """Keep the batch's work wanted."""
        self._holders += 1

    def release(self) -> None:
        """Let go; the last one gives up the work that is left."""
        self._holders -= 1
        if self._holders == 0 and not self.complete:
            self.cancel()
            self._end()

    @property
    def complete(self) -> bool:
        """Whether all work is answered."""
        return len(self._answers) == len(self.assignment.work)

    def when_complete(self, call: Callable[[], None]) -> None:
        """Call something once all work is answered or given up; at once where it is."""
        if self.complete:
            call()
        else:
            self._complete.append(call)

    def answer(self, key: int, answer: Answered | ExpertMeshError) -> None:
        """Take what came of one piece of work, by its key in the assignment."""
        self._answers[key] = answer
        for left, future in self._waiting:
            left.discard(key)
            if not left and not future.done():
                future.set_result(None)
        if self.complete:
            self._end()

    async def wait(self, experts: tuple[int, ...]) -> dict[int, ExpertMeshError]:
        """Wait until these experts have answered or failed; returns why, for those that failed."""
        left = {self.assignment.owner[expert] for expert in experts} - self._answers.keys()
        if left:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((left, future))
            await future
        return {e: error for e in experts if (error := self._error(e)) is not None}

    def outputs(self, experts: tuple[int, ...], failed: set[int]) -> tuple[Tensor | None, Tensor | None]:
        """The buffer of answers [N, ...] with those of `experts` in place, and bool [N], True where one answered.

        The second is None when none of `experts` failed; the first is None when none has answered. Raises SpecMismatch
        when experts answer with rows of different shapes.
        """
        keys = {self.assignment.owner[expert] for expert in experts}
        answered = {key: found for key in sorted(keys) if isinstance(found := self._answers[key], Answered)}
        for key, found in answered.items():
            if key not in self._stored:
                self._store(key, found)
                self._stored.add(key)
        lost = {key: found.lost for key, found in answered.items() if found.lost is not None}
        if not failed and not lost:
            return self._outputs_N, None
        answered_N = torch.zeros(self.handle.num_pairs, dtype=torch.bool)
        for expert in experts:
            if expert not in failed:
                answered_N[self.handle.pairs(expert)] = True
        for key, positions in lost.items():
            answered_N[self._pairs(key)[positions]] = False
        return self._outputs_N, answered_N

    def total(self, experts: tuple[int, ...], start: int, stop: int) -> Tensor | None:
        """The sum over `experts` for the rows start:stop [T, ...], where replicas made sums of all that they answered.

        Adds up in ascending order of the first expert of each piece of work. None where it takes more than adding:
        where an answer was lost or failed, or stands for itself among others of its replica.
        """
        keys = sorted({self.assignment.owner[expert] for expert in experts})
        if not self.assignment.sums or not all(map(self._adds_up, keys)):
            return None
        total: Tensor | None = None
        ours = False  # what came in a message is never written to
        for key in keys:
            rows, part = self._term(key, start, stop)
            if total is not None and (part.shape[1:] != total.shape[1:] or part.dtype != total.dtype):
                return None
            if rows is None:
                total, ours = part if total is None else total.add_(part) if ours else total + part, total is not None
                continue
            if total is None or not ours:
                empty = part.new_zeros((stop - start, *part.shape[1:]))
                total, ours = empty if total is None else empty.add_(total), True
            total.index_add_(0, rows, part)
        if total is not None and not ours and stop - start < self.handle.num_rows:
            return total.clone()  # a few rows must not keep the whole message in memory
        return total

    def _adds_up(self, key: int) -> bool:
        """Whether what came of a piece of work has only to be added, or weighted and added."""
        found = self._answers[key]
        if not isinstance(found, Answered) or found.lost is not None:
            return False
        if found.total is not None:
            return True
        alone = found.outputs[0] if len(found.outputs) == 1 and self.layer.combine != "mean" else None
        return isinstance(alone, Tensor) and alone.dtype in (torch.float32, torch.bfloat16, torch.float16)

    def _term(self, key: int, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """What a piece of work that adds up has for the rows start:stop: which they are, None for all, and its part."""
        work, found = self.assignment.work[key], self._answers[key]
        first, last = 0, work.size
        if stop - start < self.handle.num_rows:
            first, last = work.rows_R.numpy().searchsorted((start, stop)).tolist()
        if not isinstance(found, Answered):
            raise TypeError(f"{key} was not answered")
        if found.total is not None:  # of a pack, whose rows are distinct
            every = last - first == stop - start
            return None if every else work.rows_R[first:last] - start, found.total[first:last]
        (rows,) = found.outputs
        (expert,) = self._members(key)
        if not isinstance(rows, Tensor):
            raise TypeError(f"{key} has no rows")
        at = self.handle.offsets[expert]
        weights = term_weights(self.layer, self.handle, slice(at + first, at + last)).to(torch.float32)
        part = rows[first:last].float() * weights.view(-1, *[1] * (rows.dim() - 1))
        return work.rows_R[first:last] - start, part

    def shared_rows(self, shared: tuple[int, ...], start: int, stop: int) -> Tensor | None:
        """The sum [stop - start, ...] of what shared experts answered to some rows; None without shared experts."""
        parts = []
        for key in shared:
            found = self._answers[key]
            if isinstance(found, Answered) and isinstance(rows := found.outputs[0], Tensor):
                parts.append(rows[start:stop])
        if not parts:
            return None
        total = parts[0].double() if parts[0].dtype == torch.float64 else parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total

    def _end(self) -> None:
        calls, self._complete = self._complete, []
        for call in calls:
            call()

    def _error(self, expert: int) -> ExpertMeshError | None:
        key = self.assignment.owner[expert]
        found = self._answers[key]
        output = found.outputs[self._members(key).index(expert)] if isinstance(found, Answered) else found
        return output if isinstance(output, ExpertMeshError) else None

    def _members(self, key: int) -> tuple[int, ...]:
        return self.assignment.members[key]

    def _pairs(self, key: int) -> Tensor:
        """The pairs of a piece of work, in its own order."""
        offsets = self.handle.offsets
        return torch.cat([torch.arange(offsets[expert], offsets[expert + 1]) for expert in self._members(key)])

    def _store(self, key: int, found: Answered) -> None:
        if found.total is not None:
            self._put(self.assignment.places[key], found.total, key)
            return
        for expert, rows in zip(self._members(key), found.outputs, strict=True):
            if isinstance(rows, Tensor):
                self._put(self.handle.pairs(expert), rows, expert)

    def _put(self, places: Tensor | slice, rows: Tensor, expert: int) -> None:
        held = self._outputs_N
        if held is None:
            whole = rows.shape[0] == self.handle.num_pairs
            held = rows if whole else torch.zeros((self.handle.num_pairs, *rows.shape[1:]), dtype=rows.dtype)
            self._outputs_N = held
            if whole:
                return
        if held.shape[1:] != rows.shape[1:]:
            raise SpecMismatch(
                f"{self.layer.expert_ids[expert]} answers with rows of shape {list(rows.shape[1:])}, another expert of "
                f"the layer with {list(held.shape[1:])}: their answers cannot be combined"
            )
        if held.dtype != rows.dtype:
            held = self._outputs_N = held.to(torch.promote_types(held.dtype, rows.dtype))
        held[places] = rows.to(held.dtype)
