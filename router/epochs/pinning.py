"""Which epoch a request runs on: the current one, that of its lease, or a kept one that it names by number."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ...experts.errors import FailedPrecondition, InvalidRequest, Overloaded, RouterUnavailable, VersionGone
from ...experts.protocol import CallOptions
from .epochs import Epoch, Epochs
from .leases import Leases

CATCH_UP_SECONDS = 5.0
RECALL_ATTEMPTS = 2
RECALL_SECONDS = 30.0
"""How long at least an epoch that a request named stays loaded."""

MAX_RECALLED = 4
"""How many epochs requests may have loaded within `RECALL_SECONDS`: each may be a copy of all experts."""

Recall = Callable[[int], Awaitable[None]]
"""Loads a kept epoch again. Raises FailedPrecondition, NotFound or Unavailable."""


class Pinning:
    """Pins an epoch for each request: waits while the router is behind, and recalls a kept epoch that is not loaded."""

    def __init__(self, epochs: Epochs, leases: Leases) -> None:
        self.recall: Recall | None = None
        self._epochs = epochs
        self._leases = leases
        self._adopted = asyncio.Event()
        self._recalls: dict[int, asyncio.Future[None]] = {}
        self._recalled_at: dict[int, float] = {}

    def adopted(self) -> None:
        """Wake the requests that wait for a newer epoch."""
        self._adopted.set()
        self._adopted = asyncio.Event()

    async def pin(self, options: CallOptions, timeout: float) -> Epoch:
        """Pin the epoch that a request with these options runs on; the caller must unpin it.

        Raises InvalidRequest for both an epoch and a lease, FailedPrecondition for a lease that has ended or an epoch
        that is not kept, NotFound for an epoch that never existed, RouterUnavailable if the router does not catch up.
        """
        if options.epoch is not None and options.pin is not None:
            raise InvalidRequest("epoch and pin exclude each other: a lease already fixes the epoch")
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
        """Recall an epoch; concurrent requests for the same epoch share one recall.

        Raises Overloaded if several others were recalled lately, which stay loaded for a while.
        """
        if self.recall is None:
            raise VersionGone(f"epoch {number} is not loaded here; the current one is {self._epochs.number}")
        pending = self._recalls.get(number)
        if pending is None:
            self._make_room(number, asyncio.get_running_loop().time())
            pending = self._recalls[number] = asyncio.ensure_future(self.recall(number))
            pending.add_done_callback(lambda recall: self._recalled(number, recall))
        await asyncio.shield(pending)  # other requests still wait for it if this one is cancelled

    def _make_room(self, number: int, now: float) -> None:
        self._recalled_at = {n: at for n, at in self._recalled_at.items() if now - at < RECALL_SECONDS}
        if number not in self._recalled_at and len(self._recalled_at) >= MAX_RECALLED:
            others = ", ".join(map(str, sorted(self._recalled_at)))
            raise Overloaded(
                f"epoch {number} cannot be loaded beside the epochs {others}, which calls named in the last "
                f"{RECALL_SECONDS:g} s: retry later, or name one of those",
                retry_after=RECALL_SECONDS - (now - min(self._recalled_at.values())),
            )
        self._recalled_at[number] = now

    def _recalled(self, number: int, recall: asyncio.Future[Any]) -> None:
        del self._recalls[number]
        if recall.cancelled() or recall.exception() is not None:  # retrieved: who waited may have been cancelled
            self._recalled_at.pop(number, None)

    async def _catch_up(self, options: CallOptions, timeout: float) -> None:
        """Wait for the epoch that the client has seen, at most half its timeout, so that an error still reaches it."""
        deadline = asyncio.get_running_loop().time() + min(timeout / 2, CATCH_UP_SECONDS)
        while self._behind(options):
            adopted = self._adopted
            try:
                await asyncio.wait_for(adopted.wait(), deadline - asyncio.get_running_loop().time())
            except (asyncio.TimeoutError, TimeoutError):
                raise RouterUnavailable(
                    f"this router is at epoch {self._epochs.number}, the client has seen epoch {options.min_epoch}: "
                    "retry in a moment; if the cluster's state was restored from a backup, create a new client"
                ) from None

    def _behind(self, options: CallOptions) -> bool:
        if self._epochs.number >= options.min_epoch:
            return False
        cluster = self._epochs.current.cluster if self._epochs.number else ""
        return not options.cluster or not cluster or options.cluster == cluster


def fixed_epoch_gone(options: CallOptions, error: VersionGone) -> FailedPrecondition:
    """The error of a request with a fixed epoch whose versions are gone: it cannot run on another epoch."""
    epoch = f"epoch {options.epoch}" if options.epoch is not None else "the leased epoch"
    return VersionGone(f"{epoch} cannot serve the request: {error.message}; call without it, or retry in a moment")
