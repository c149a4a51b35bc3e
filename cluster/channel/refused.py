"""Routers that a replica serves no longer, because the controller has given them up."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

REMEMBERED = 10_000


def identity(name: str, session: str) -> str:
    """How a router names itself to replicas: its name and its session, of which it may have one after the other."""
    return f"{name}/{session}"


class Refused:
    """The sessions that are refused, for good: a router that comes back has another one. Any thread may ask."""

    def __init__(self) -> None:
        self._order: deque[str] = deque(maxlen=REMEMBERED)
        self._sessions: frozenset[str] = frozenset()

    def __contains__(self, router: str) -> bool:
        return router in self._sessions

    def add(self, given_up: Mapping[str, str], connected: Iterable[str]) -> None:
        """Refuse these routers from now on: by name, a session, or "" for those that are `connected` under the name."""
        named = {identity(name, session) for name, session in given_up.items() if session}
        present = {router for router in connected if given_up.get(router.rpartition("/")[0]) == ""}
        self._order.extend(sorted((named | present) - self._sessions))
        self._sessions = frozenset(self._order)
