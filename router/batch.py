"""A batch on its way: one job per expert, one buffer for the answers, and requests that each wait for their part.

Shapes: N pairs of a row and an expert, sorted by expert, then by row.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..experts.errors import SpecMismatch
from .dispatch import Dispatch
from .epochs import Epoch
from .gates import Routing
from .layer import Layer


@dataclass(eq=False)
class Batch:
    """Rows `x` [T, ...] of one layer on one epoch, and the answers of its experts as they come in.

    `answers` holds a future for every expert that the batch needs, by its position among all experts of the layer:
    those that the gate chooses from come first, then the shared ones, which answer every row. The batch is held by
    those who wait for it; when the last one lets go, what was not sent yet is not sent any more.
    """

    epoch: Epoch
    layer: Layer
    x: Tensor
    routing: Routing
    handle: Dispatch
    answers: dict[int, asyncio.Future[Tensor]]
    _holders: int = 1
    _stored: set[int] = field(default_factory=set)
    _outputs_N: Tensor | None = None

    def hold(self) -> None:
        """Keep the batch's work wanted."""
        self._holders += 1

    def release(self) -> None:
        """Let go; the last one cancels the work that is left."""
        self._holders -= 1
        if self._holders == 0:
            for answer in self.answers.values():
                answer.cancel()

    async def wait(self, experts: tuple[int, ...]) -> dict[int, BaseException]:
        """Wait until these experts have answered or failed; returns why, for those that failed."""
        futures = {expert: self.answers[expert] for expert in experts}
        if futures:
            await asyncio.wait(futures.values())
        return {e: error for e, future in futures.items() if (error := future.exception()) is not None}

    def outputs(self, experts: tuple[int, ...], failed: set[int]) -> tuple[Tensor | None, Tensor | None]:
        """The buffer of answers [N, ...] with those of `experts` in place, and bool [N], True where one answered.

        The second is None when none of `experts` failed; the first is None when none has answered. Raises SpecMismatch
        when experts answer with rows of different shapes.
        """
        for expert in experts:
            if expert not in failed and expert not in self._stored:
                self._store(expert, self.answers[expert].result())
                self._stored.add(expert)
        if not failed:
            return self._outputs_N, None
        answered_N = torch.zeros(self.handle.num_pairs, dtype=torch.bool)
        for expert in experts:
            if expert not in failed:
                answered_N[self.handle.pairs(expert)] = True
        return self._outputs_N, answered_N

    def shared_rows(self, shared: tuple[int, ...], start: int, stop: int) -> Tensor | None:
        """The sum [stop - start, ...] of what shared experts answered to some rows; None without shared experts."""
        parts = [self.answers[expert].result()[start:stop] for expert in shared]
        if not parts:
            return None
        total = parts[0].double() if parts[0].dtype == torch.float64 else parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total

    def _store(self, expert: int, rows: Tensor) -> None:
        pairs = self.handle.pairs(expert)
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
        held[pairs] = rows.to(held.dtype)
