"""Follows the controller from a caller's process: joins, fetches orders, carries them out, and leaves.

Whatever is lost on the way is asked for again; a controller that restarted, or has given this router up, is joined once
more. Meanwhile the router serves on, as far as the replicas let it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ...experts.errors import ExpertMeshError, NotFound
from ..control.routers.mailbox import Letter

log = logging.getLogger(__name__)
POLL_SECONDS = 5.0
"""How long a poll waits for an order."""
BUSY_SECONDS = 0.05
"""How long it waits while an order is carried out: its answer goes with the next poll."""
AGAIN_SECONDS = 0.2
LEAVE_SECONDS = 2.0

Carry = Callable[[str, tuple[Any, ...]], Awaitable[Any]]
"""Carries out an order, given its method and arguments."""


class Seat(Protocol):
    """How a router in a caller's process reaches the controller. Each raises Unavailable where it does not answer."""

    async def join(self, name: str, fresh: bool) -> str:
        """Become a member, perhaps once more; returns the id of its mailbox. One that is `fresh` has served nothing."""

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        """Hand over answers and wait for orders, as `Mailbox.fetch`. Raises NotFound for a mailbox that is gone."""

    async def leave(self, name: str) -> None:
        """Be a member no longer: nothing is pinned, and nothing will be served any more."""


class Follower:
    """A member's connection to the controller; belongs to one event loop. `problem` is why it was last not reached."""

    def __init__(self, seat: Seat, name: str, carry: Carry, fresh: Callable[[], bool]) -> None:
        self._seat = seat
        self._name = name
        self._carry = carry
        self._fresh = fresh
        self.problem = "it has not been told its layers yet"
        self._box = ""
        self._answers: dict[int, Any] = {}
        self._running: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow the controller until cancelled."""
        try:
            while True:
                try:
                    await self._turn()
                except NotFound:
                    log.info("%s joins again: the controller has restarted, or had given it up", self._name)
                    self._forget()
                except ExpertMeshError as error:
                    log.debug("%s did not reach the controller: %s", self._name, error)
                    self.problem = error.message
                    await asyncio.sleep(AGAIN_SECONDS)
                except Exception:  # a bug of ours must be seen, and must not leave a router that follows nobody
                    log.exception("following the controller failed")
                    await asyncio.sleep(AGAIN_SECONDS)
        finally:
            self._forget()

    async def leave(self) -> None:
        """Tell the controller that this member is gone; it would notice a while later."""
        with suppress(ExpertMeshError, asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._seat.leave(self._name), LEAVE_SECONDS)

    async def _turn(self) -> None:
        if not self._box:
            self._box = await self._seat.join(self._name, self._fresh())
        sent = dict(self._answers)
        held = [*self._running, *sent]
        seconds = BUSY_SECONDS if self._running else POLL_SECONDS
        letters = await self._seat.fetch(self._name, self._box, sent, held, seconds)
        for number in sent:
            del self._answers[number]
        for letter in letters:
            if letter.number not in self._running:
                self._running[letter.number] = asyncio.ensure_future(self._carried(self._box, letter))
        if self._running:
            await asyncio.wait(self._running.values(), timeout=BUSY_SECONDS, return_when=asyncio.FIRST_COMPLETED)

    async def _carried(self, box: str, letter: Letter) -> None:
        try:
            answer = await self._carry(letter.method, letter.arguments)
        except ExpertMeshError as error:
            answer = error
        except Exception as error:  # a bug of ours: the controller has to hear of it, as it would from an actor
            log.exception("an order could not be carried out", extra={"method": letter.method})
            answer = ExpertMeshError(f"an attached router raised {type(error).__name__}; see its log")
        if box == self._box:
            self._answers[letter.number] = answer
            del self._running[letter.number]

    def _forget(self) -> None:
        """Let go of everything that belongs to the present mailbox."""
        self._box = ""
        for task in self._running.values():
            task.cancel()
        self._running.clear()
        self._answers.clear()
