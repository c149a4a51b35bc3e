"""Which routers are heard, which are given up, and which replicas know it: pure decisions, no clock and no Ray."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

LONGEST_TURN = 3.0
"""A turn counts for so many seconds at most: a controller that was frozen itself has not listened meanwhile."""


class RouterLeases:
    """A router that is not heard for `seconds` is given up, and gone once no replica serves it any more.

    Until then it may still answer, so an epoch that it may pin is not retired, and swaps wait for it. One that was
    given up serves again under another session.
    """

    def __init__(self, seconds: float) -> None:
        self.gone: frozenset[str] = frozenset()
        self._seconds = seconds
        self._time = 0.0
        self._ticked: float | None = None
        self._heard: dict[str, float] = {}
        self._sessions: dict[str, str] = {}
        self._given_up: dict[str, str] = {}
        self._told: dict[str, Mapping[str, str] | None] = {}

    @property
    def given_up(self) -> dict[str, str]:
        """The routers that are given up by name, each with its last session, or "" where none was heard."""
        return dict(self._given_up)

    def expect(self, names: Collection[str]) -> None:
        """Say which routers there are: each has a lease from now on, and others are forgotten."""
        for name in self._heard.keys() - set(names):
            self.forget(name)
        for name in names:
            self._heard.setdefault(name, self._time)

    def forget(self, name: str) -> None:
        """A router has left: it serves nothing any more, and says so itself."""
        for known in (self._heard, self._sessions, self._given_up):
            known.pop(name, None)
        self.gone -= {name}

    def session(self, name: str) -> str:
        """The session of a router that is not given up, or ""."""
        return "" if name in self._given_up else self._sessions.get(name, "")

    def heard(self, name: str, session: str) -> bool:
        """A router has reported under a session; whether it may answer, which it may not where that was given up."""
        if session == self._given_up.get(name):
            return False
        self._given_up.pop(name, None)
        self.gone -= {name}
        self._heard[name], self._sessions[name] = self._time, session
        return True

    def tick(self, now: float) -> list[str]:
        """Let time pass, up to `now` in seconds; the routers that are given up at this moment."""
        if self._ticked is not None:
            self._time += min(now - self._ticked, LONGEST_TURN)
        self._ticked = now
        late = [name for name, moment in self._heard.items() if self._time - moment > self._seconds]
        new = [name for name in late if name not in self._given_up]
        for name in new:
            self._given_up[name] = self._sessions.get(name, "")
        return new

    def told(self, replica: str, given_up: Mapping[str, str]) -> None:
        """A replica has answered that it serves these no more."""
        self._told[replica] = given_up

    def down(self, replica: str) -> None:
        """A replica is not there: what starts in its place is unknown to routers until they are told of it."""
        self._told[replica] = None

    def leave(self, replicas: Iterable[str]) -> list[str]:
        """The routers that are gone now: each of these replicas knows that they are given up, or is down."""
        told = [known for replica in replicas if (known := self._told.get(replica, {})) is not None]
        new = [
            name
            for name, session in self._given_up.items()
            if name not in self.gone and all(known.get(name) == session for known in told)
        ]
        self.gone |= set(new)
        return new
