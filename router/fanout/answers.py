"""The answers of a batch: a row for each pair, or the sums that its replicas computed.

Shapes: T rows, N pairs of a row and an expert, sorted by expert, then by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import ExpertMeshError, SpecMismatch, Unavailable
from ..mixture.layer import Layer
from .work import Assignment


@dataclass(frozen=True, eq=False)
class Answered:
    """The answer to one piece of work: the rows [pairs, ...] of each of its experts, or the expert's error.

    If the replica added them up, `total` [R, ...] is the sum, `outputs` holds None in place of rows, and `lost` int64
    are the pairs of the work that the sum leaves out because their answer is not finite.
    """

    outputs: tuple[Tensor | ExpertMeshError | None, ...]
    total: Tensor | None = None
    lost: Tensor | None = None


@dataclass(frozen=True)
class DiedTogether:
    """In place of an answer: a replica died while it computed the rows of several requests.

    Each of them is to be sent alone, to none of the replicas that were `tried`. `deaths` counts those that died.
    """

    deaths: int
    tried: frozenset[str]


Result = Answered | ExpertMeshError | DiedTogether


class Answers:
    """Collects the answers of one batch, by the key of the work in its assignment."""

    def __init__(self, layer: Layer, assignment: Assignment) -> None:
        self._layer = layer
        self._assignment = assignment
        self._handle = assignment.handle
        self._results: dict[int, Result] = {}
        self._stored: set[int] = set()
        self._outputs_N: Tensor | None = None

    def put(self, key: int, result: Result) -> None:
        """Store the result of one piece of work."""
        self._results[key] = result

    @property
    def complete(self) -> bool:
        """Whether all work is answered."""
        return len(self._results) == len(self._assignment.work)

    def pending(self, experts: Sequence[int]) -> set[int]:
        """The keys of the work of these experts that has no result yet."""
        return {self._assignment.owner[expert] for expert in experts} - self._results.keys()

    def errors(self, experts: Sequence[int]) -> dict[int, ExpertMeshError]:
        """The errors of those of `experts` that failed."""
        return {expert: error for expert in experts if (error := self._error(expert)) is not None}

    def died_together(self, experts: Sequence[int]) -> dict[int, DiedTogether]:
        """Those of `experts` whose replica died while it computed rows of several requests."""
        results = {expert: self._results[self._assignment.owner[expert]] for expert in experts}
        return {expert: result for expert, result in results.items() if isinstance(result, DiedTogether)}

    def answered(self, experts: Sequence[int]) -> Tensor | None:
        """Bool [N], True where one of `experts` answered and its answer is not known to be lost; None if all did."""
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
        """The buffer of all pairs [N, ...] with the answers of `experts` filled in; None if none has answered.

        Not for a batch whose replicas add up. Raises SpecMismatch if experts answer with rows of different shapes.
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
        """The total [stop - start, ...] of the replicas' sums for the rows start:stop; None if none has answered.

        Adds in ascending order of the first expert of each piece of work, and never writes to the tensors of a
        message. Raises SpecMismatch as `outputs` does.
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
        """The sum [stop - start, ...] of the shared experts' answers to the rows start:stop; None without answers."""
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
        """One replica's sums for the rows start:stop [stop - start, ...], 0 for rows that it does not have."""
        work = self._assignment.work[key]
        first, last = 0, work.size
        if stop - start < self._handle.num_rows:
            first, last = work.rows_R.numpy().searchsorted((start, stop)).tolist()
        rows = sums_R[first:last]
        if work.index_P is not None and last - first == stop - start:  # the rows of a pack are distinct: it has all
            return rows if len(rows) == work.size else rows.clone()  # a slice would keep the whole message in memory
        return rows.new_zeros((stop - start, *rows.shape[1:])).index_add_(0, work.rows_R[first:last] - start, rows)

    def _error(self, expert: int) -> ExpertMeshError | None:
        key = self._assignment.owner[expert]
        result = self._results[key]
        if isinstance(result, Answered):
            output = result.outputs[self._assignment.members[key].index(expert)]
            return output if isinstance(output, ExpertMeshError) else None
        return Unavailable("its replica died; retry") if isinstance(result, DiedTogether) else result

    def _pairs(self, key: int) -> Tensor:
        """The pairs of a piece of work, in its own order."""
        offsets = self._handle.offsets
        return torch.cat([torch.arange(offsets[e], offsets[e + 1]) for e in self._assignment.members[key]])

    def _store(self, expert: int, rows: Tensor) -> None:
        buffer_N, num_pairs = self._outputs_N, self._handle.num_pairs
        if buffer_N is None:
            if rows.shape[0] == num_pairs:
                self._outputs_N = rows
                return
            buffer_N = torch.zeros((num_pairs, *rows.shape[1:]), dtype=rows.dtype)
        if buffer_N.shape[1:] != rows.shape[1:]:
            raise self._mismatch(expert, rows, buffer_N)
        if buffer_N.dtype != rows.dtype:
            buffer_N = buffer_N.to(torch.promote_types(buffer_N.dtype, rows.dtype))
        buffer_N[self._handle.pairs(expert)] = rows.to(buffer_N.dtype)
        self._outputs_N = buffer_N

    def _mismatch(self, expert: int, rows: Tensor, others: Tensor) -> SpecMismatch:
        return SpecMismatch(
            f"{self._layer.expert_ids[expert]} answers with rows of shape {list(rows.shape[1:])}, another expert of "
            f"the layer with {list(others.shape[1:])}: their answers cannot be combined"
        )
