"""Which epoch a request runs on: the current one, or that of its lease, or one that it names and that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ...experts.errors import FailedPrecondition, InvalidRequest, Unavailable, VersionGone
from ...experts.protocol import CallOptions
from .epochs import Epoch, Epochs
from .leases import Leases

CATCH_UP_SECONDS = 5.0
RECALL_ATTEMPTS = 2

Recall = Callable[[int], Awaitable[None]]
"""Has an epoch that is kept loaded again. Raises FailedPrecondition, NotFound or Unavailable."""


class Pinning:
    """Leases an epoch for each request; a router that is behind catches up, an epoch out of memory is recalled."""

    def __init__(self, epochs: Epochs, leases: Leases) -> None:
        self.recall: Recall | None = None
        self._epochs = epochs
        self._leases = leases
        self._adopted = asyncio.Event()
        self._recalls: dict[int, asyncio.Future[None]] = {}

    def adopted(self) -> None:
        """Wake the requests that wait for a newer epoch."""
        self._adopted.set()
        self._adopted = asyncio.Event()

    async def pin(self, options: CallOptions, timeout: float) -> Epoch:
        """Pin the epoch that a request with these options runs on; the caller gives it back to `epochs`.

        Raises InvalidRequest, FailedPrecondition for a lease that is over or an epoch that is not kept, NotFound for
        one that never was, and Unavailable where the router does not catch up.
        """
        if options.epoch is not None and options.pin is not None:
            raise InvalidRequest("epoch and pin exclude each other: a lease has its epoch")
        if options.pin is not None:
            return self._leases.pin(options.pin)
        if options.epoch is not None:
            return await self._pin_number(options.epoch)
        await self._catch_up(options, timeout)
        return self._epochs.pin()

    async def _pin_number(self, number: int) -> Epoch:
        for _ in range(RECALL_ATTEMPTS):
            if self._epochs.knows(number):
                return self._epochs.pin(number)
            await self.fetch(number)
        return self._epochs.pin(number)

    async def fetch(self, number: int) -> None:
        """Have an epoch loaded again; requests that ask for the same one at the same time wait for one recall."""
        if self.recall is None:
            raise VersionGone(f"epoch {number} is not loaded here; the current one is {self._epochs.number}")
        under_way = self._recalls.get(number)
        if under_way is None:
            under_way = self._recalls[number] = asyncio.ensure_future(_awaited(self.recall(number)))
            under_way.add_done_callback(lambda done: self._recalled(number, done))
        await asyncio.shield(under_way)  # the others still wait for it where this caller gives up

    def _recalled(self, number: int, done: asyncio.Future[Any]) -> None:
        del self._recalls[number]
        if not done.cancelled():
            done.exception()  # whoever waited for it may be gone: that is no bug

    async def _catch_up(self, options: CallOptions, timeout: float) -> None:
        """Wait until the router has the epoch that the client has seen: half of its time, so that it hears of it."""
        until = asyncio.get_running_loop().time() + min(timeout / 2, CATCH_UP_SECONDS)
        while self._behind(options):
            adopted = self._adopted
            try:
                await asyncio.wait_for(adopted.wait(), until - asyncio.get_running_loop().time())
            except (asyncio.TimeoutError, TimeoutError):
                raise Unavailable(
                    f"this router is at epoch {self._epochs.number}, the client has seen epoch {options.min_epoch}: "
                    "retry in a moment; if the cluster's state was restored from a backup, make a new client"
                ) from None

    def _behind(self, options: CallOptions) -> bool:
        if self._epochs.number >= options.min_epoch:
            return False
        ours = self._epochs.current.cluster if self._epochs.number else ""
        return not options.cluster or not ours or options.cluster == ours


async def _awaited(work: Awaitable[None]) -> None:
    await work


def refuse_restart(options: CallOptions, error: VersionGone) -> FailedPrecondition:
    """What a caller is told who has fixed the epoch, and whose versions are gone: no other epoch would do."""
    which = f"epoch {options.epoch}" if options.epoch is not None else "the leased epoch"
    return VersionGone(f"{which} cannot be answered: {error.message}; call without it, or retry in a moment")
