"""What the experts of a batch answered: a row for each pair, or the sums that their replicas have made.

Shapes: T rows, N pairs of a row and an expert, sorted by expert, then by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import ExpertMeshError, SpecMismatch
from ..mixture.layer import Layer
from .work import Assignment


@dataclass(frozen=True, eq=False)
class Answered:
    """What came of one piece of work: its experts' rows, each [pairs, ...], or why there are none.

    Where they were added up, `total` [R, ...] is their sum, `outputs` None, and `lost` int64 are the pairs of the work
    that are not in it because their answer was not finite.
    """

    outputs: tuple[Tensor | ExpertMeshError | None, ...]
    total: Tensor | None = None
    lost: Tensor | None = None


Result = Answered | ExpertMeshError


class Answers:
    """The answers of one batch as they come in, by the key of the work in its assignment."""

    def __init__(self, layer: Layer, assignment: Assignment) -> None:
        self._layer = layer
        self._assignment = assignment
        self._handle = assignment.handle
        self._results: dict[int, Result] = {}
        self._stored: set[int] = set()
        self._outputs_N: Tensor | None = None

    def put(self, key: int, result: Result) -> None:
        """Take what came of one piece of work."""
        self._results[key] = result

    @property
    def complete(self) -> bool:
        """Whether all work is answered."""
        return len(self._results) == len(self._assignment.work)

    def lacking(self, experts: Sequence[int]) -> set[int]:
        """The keys of the work of these experts that is not answered yet."""
        return {self._assignment.owner[expert] for expert in experts} - self._results.keys()

    def errors(self, experts: Sequence[int]) -> dict[int, ExpertMeshError]:
        """Why, for those of `experts` that failed."""
        return {expert: error for expert in experts if (error := self._error(expert)) is not None}

    def answered(self, experts: Sequence[int]) -> Tensor | None:
        """Bool [N], True where one of `experts` answered and its answer is not known to be lost; None where all did."""
        failed = self.errors(experts)
        lost = {key: answer.lost for key, answer in self._answers(experts).items() if answer.lost is not None}
        if not failed and not lost:
            return None
        answered_N = torch.zeros(self._handle.num_pairs, dtype=torch.bool)
        for expert in experts:
            if expert not in failed:
                answered_N[self._handle.pairs(expert)] = True
        for key, positions in lost.items():
            answered_N[self._pairs(key)[positions]] = False
        return answered_N

    def outputs(self, experts: Sequence[int]) -> Tensor | None:
        """The buffer of all pairs [N, ...] with the answers of `experts` in place; None when none has answered.

        Not for a batch whose replicas add up. Raises SpecMismatch when experts answer with rows of different shapes.
        """
        for key, answer in self._answers(experts).items():
            if key in self._stored:
                continue
            for expert, rows in zip(self._assignment.members[key], answer.outputs, strict=True):
                if isinstance(rows, Tensor):
                    self._store(expert, rows)
            self._stored.add(key)
        return self._outputs_N

    def total(self, experts: Sequence[int], start: int, stop: int) -> Tensor | None:
        """The sum [T, ...] for the rows start:stop of what replicas have added up; None when none has answered.

        Adds in ascending order of the first expert of each piece of work. What came in a message is never written to.
        Raises SpecMismatch as `outputs` does.
        """
        total: Tensor | None = None
        for key, answer in self._answers(experts).items():
            if answer.total is None:  # all its experts failed
                continue
            part = self._part(key, answer.total, start, stop)
            if total is not None and part.shape[1:] != total.shape[1:]:
                raise self._mismatch(key, part, total)
            total = part if total is None else total + part
        return total

    def shared_rows(self, shared: Sequence[int], start: int, stop: int) -> Tensor | None:
        """The sum [stop - start, ...] of what shared experts answered to some rows; None without shared experts."""
        total: Tensor | None = None
        for key in shared:
            answer = self._results[key]
            if isinstance(answer, Answered) and isinstance(rows := answer.outputs[0], Tensor):
                part = rows[start:stop]
                part = part if part.dtype == torch.float64 else part.float()
                total = part if total is None else total + part
        return total

    def _answers(self, experts: Sequence[int]) -> dict[int, Answered]:
        keys = sorted({self._assignment.owner[expert] for expert in experts})
        return {key: answer for key in keys if isinstance(answer := self._results[key], Answered)}

    def _part(self, key: int, sums_R: Tensor, start: int, stop: int) -> Tensor:
        """What one replica's sums have for the rows start:stop: [stop - start, ...], 0 where it has none."""
        work = self._assignment.work[key]
        first, last = 0, work.size
        if stop - start < self._handle.num_rows:
            first, last = work.rows_R.numpy().searchsorted((start, stop)).tolist()
        rows = sums_R[first:last]
        if work.index_P is not None and last - first == stop - start:  # of a pack, whose rows are distinct: all of them
            return rows if len(rows) == work.size else rows.clone()  # a few must not keep the whole in memory
        return rows.new_zeros((stop - start, *rows.shape[1:])).index_add_(0, work.rows_R[first:last] - start, rows)

    def _error(self, expert: int) -> ExpertMeshError | None:
        key = self._assignment.owner[expert]
        result = self._results[key]
        if isinstance(result, Answered):
            output = result.outputs[self._assignment.members[key].index(expert)]
            return output if isinstance(output, ExpertMeshError) else None
        return result

    def _pairs(self, key: int) -> Tensor:
        """The pairs of a piece of work, in its own order."""
        offsets = self._handle.offsets
        return torch.cat([torch.arange(offsets[e], offsets[e + 1]) for e in self._assignment.members[key]])

    def _store(self, expert: int, rows: Tensor) -> None:
        held, num_pairs = self._outputs_N, self._handle.num_pairs
        if held is None:
            if rows.shape[0] == num_pairs:
                self._outputs_N = rows
                return
            held = torch.zeros((num_pairs, *rows.shape[1:]), dtype=rows.dtype)
        if held.shape[1:] != rows.shape[1:]:
            raise self._mismatch(expert, rows, held)
        if held.dtype != rows.dtype:
            held = held.to(torch.promote_types(held.dtype, rows.dtype))
        held[self._handle.pairs(expert)] = rows.to(held.dtype)
        self._outputs_N = held

    def _mismatch(self, expert: int, rows: Tensor, others: Tensor) -> SpecMismatch:
        return SpecMismatch(
            f"{self._layer.expert_ids[expert]} answers with rows of shape {list(rows.shape[1:])}, another expert of "
            f"the layer with {list(others.shape[1:])}: their answers cannot be combined"
        )
