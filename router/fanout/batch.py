"""The rows of one batch, in flight to experts and back, and who waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...experts.errors import ExpertMeshError
from ..epochs.epochs import Epoch
from ..gates import Routing
from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer
from .answers import Answers, Result
from .work import Assignment


def _nothing() -> None:
    """Cancel a batch that is over."""


@dataclass(eq=False)
class Batch:
    """Rows `x` [T, ...] of one layer on one epoch, in flight to experts and back.

    Each request that waits for the batch holds it; when the last one releases it, `cancel` drops the unfinished work.
    A batch that is over does not refer to its work: in a cycle they would keep the rows until a garbage collection.
    """

    epoch: Epoch
    layer: Layer
    x: Tensor
    routing: Routing
    handle: Dispatch
    assignment: Assignment
    cancel: Callable[[], None] = _nothing
    answers: Answers = field(init=False)
    _waiters: list[tuple[set[int], asyncio.Future[None]]] = field(default_factory=list)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)
    _holders: int = 1

    def __post_init__(self) -> None:
        self.answers = Answers(self.layer, self.assignment)

    def hold(self) -> None:
        """Add a holder."""
        self._holders += 1

    def release(self) -> None:
        """Remove a holder; the last one cancels the unfinished work."""
        self._holders -= 1
        if self._holders == 0 and not self.answers.complete:
            self.cancel()
            self._end()

    def when_complete(self, callback: Callable[[], None]) -> None:
        """Call back once all work is answered or cancelled; at once if it is answered already."""
        if self.answers.complete:
            callback()
        else:
            self._callbacks.append(callback)

    def answer(self, key: int, result: Result) -> None:
        """Store the result of one piece of work, by its key in the assignment."""
        self.answers.put(key, result)
        for pending, future in self._waiters:
            pending.discard(key)
            if not pending and not future.done():
                future.set_result(None)
        if self.answers.complete:
            self._end()

    async def wait(self, experts: Sequence[int]) -> dict[int, ExpertMeshError]:
        """Wait until these experts have answered or failed; returns the errors of those that failed."""
        if pending := self.answers.pending(experts):
            future = asyncio.get_running_loop().create_future()
            self._waiters.append((pending, future))
            await future
        return self.answers.errors(experts)

    def _end(self) -> None:
        callbacks, self._callbacks, self._waiters, self.cancel = self._callbacks, [], [], _nothing
        for callback in callbacks:
            callback()
