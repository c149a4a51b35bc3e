"""The controller's desk for its owner, who alone can start and end replicas: what is asked of it waits here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from ...experts.errors import Unavailable
from ..config.layer_changes import LayersRequest
from ..control.messages import ScaleRequest
from ..control.routers.mailbox import Letter, Mailbox

AWAY_SECONDS = 5.0
"""How long the owner may not be heard before nothing is left for it."""

LATE_SECONDS = 30.0
"""How long beyond its time a change is waited for: until it has been taken back."""


class OwnerDesk:
    """Hands changes to the owner when it fetches them, on the event loop of the controller."""

    def __init__(self) -> None:
        self._box = Mailbox()
        self._heard = -math.inf
        self._fetched: set[str] = set()

    async def ask(self, request: ScaleRequest | LayersRequest) -> dict[str, Any]:
        """Have the owner carry out a change; returns what it says. The same change id again gives the same.

        Raises its error, and Unavailable where it does not fetch the change, or does not say in time what became of it.
        """
        now = asyncio.get_running_loop().time()
        if now - self._heard > AWAY_SECONDS:
            raise _away()
        answer = asyncio.ensure_future(self._box.ask("change", request))
        try:
            await asyncio.wait([answer], timeout=AWAY_SECONDS)
            if not answer.done() and request.change_id not in self._fetched:
                raise _away()
            await asyncio.wait([answer], timeout=request.timeout + LATE_SECONDS)
            if not answer.done():
                raise Unavailable(f"the owner of the cluster has not said what became of change {request.change_id}")
            found: dict[str, Any] = answer.result()
            return found
        finally:
            answer.cancel()

    async def fetch(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        """Take the owner's answers by number; returns the changes that have none yet, as their first argument."""
        self._heard = asyncio.get_running_loop().time()
        letters = await self._box.fetch(answers, (), 0.0)
        self._fetched = {letter.arguments[0].change_id for letter in letters}
        return letters


def _away() -> Unavailable:
    return Unavailable("nothing was changed: the process that owns the cluster does not answer, and it starts replicas")
