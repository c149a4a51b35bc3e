"""What probes and deaths say of a replica, and what is made of it: pure decisions, no clock and no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...router.fanout.replica_view import DRAINING, READY, Replica

TIMEOUTS_UNTIL_UNRESPONSIVE = 3
DEATHS_UNTIL_DEADLY = 2
FIRST_REST = 5.0
LONGEST_REST = 600.0


@dataclass(frozen=True)
class Probe:
    """The outcome of one probe: the replica's own report, or why there is none ("down" or "timeout").

    `problem` says why a replica that is down does not come back yet, where that is known.
    """

    report: Replica | None = None
    failure: str = ""
    problem: str = ""


class Health:
    """Remembers the replicas by their last report, and turns probes into states."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._timeouts: dict[str, int] = {}
        self._asked: set[str] = set()
        self._draining: frozenset[str] = frozenset()

    def expect(self, wanted: dict[str, tuple[str, ...]], draining: frozenset[str] = frozenset()) -> None:
        """Say which replicas there are to be, what experts each is for, and which drain; others are forgotten."""
        self._draining = draining
        for name in set(self._replicas) - set(wanted):
            del self._replicas[name]
            self._timeouts.pop(name, None)
            self._asked.discard(name)
        for name, experts in wanted.items():
            self._replicas[name] = replace(self._replicas.get(name, Replica(id=name)), experts=experts)

    def probed(self, name: str, probe: Probe) -> None:
        """Take the outcome of a probe.

        A replica that is gone is restarting at once: Ray starts it again. One that is late is believed to be busy, as
        before, until several probes in a row were late.
        """
        known = self._replicas.get(name)
        if known is None:
            return
        self._asked.add(name)
        if probe.report is not None:
            self._timeouts[name] = 0
            self._replicas[name] = replace(probe.report, experts=known.experts)
        elif probe.failure == "timeout":
            self._timeouts[name] = self._timeouts.get(name, 0) + 1
            if self._timeouts[name] >= TIMEOUTS_UNTIL_UNRESPONSIVE and known.state == READY:
                self._replicas[name] = replace(known, state="unresponsive")
        elif known.state != "starting":
            ended_by = "" if known.state == "waiting" else known.problem
            state = "waiting" if probe.problem else "restarting"
            self._replicas[name] = replace(known, state=state, holds=frozenset(), problem=probe.problem or ended_by)

    def all_asked(self) -> bool:
        """Whether every replica was probed once: before that, routers know better than this controller which serve."""
        return self._asked >= self._replicas.keys()

    def holds(self, name: str, incarnation: str, id: str, version: str) -> None:
        """A replica has just said that it holds a version."""
        known = self._replicas.get(name)
        if known is not None and known.incarnation == incarnation:
            self._replicas[name] = replace(known, holds=known.holds | {(id, version)})

    def forgets(self, name: str, id: str, version: str) -> None:
        """A replica is about to forget a version: it must not be chosen for it any more."""
        known = self._replicas.get(name)
        if known is not None:
            self._replicas[name] = replace(known, holds=known.holds - {(id, version)})

    def replicas(self) -> tuple[Replica, ...]:
        """Every replica as it is known now."""
        return tuple(
            replace(known, state=DRAINING) if name in self._draining and known.state == READY else known
            for name, known in self._replicas.items()
        )


@dataclass
class DeadlyVersions:
    """Versions that end the process of a replica that loads them, which takes the other experts of its pack with it.

    After `DEATHS_UNTIL_DEADLY` deaths the replica is spared the version for `FIRST_REST` seconds, and after each
    further one for twice as long, up to `LONGEST_REST`. Times are in seconds of any one clock.
    """

    _deaths: dict[tuple[str, str, str], int] = field(default_factory=dict)
    _rests: dict[tuple[str, str, str], tuple[float, float]] = field(default_factory=dict)

    def died(self, member: str, id: str, version: str, now: float) -> bool:
        """A replica's process ended while it loaded a version; returns whether that is the version's doing."""
        key = (member, id, version)
        deaths = self._deaths[key] = self._deaths.get(key, 0) + 1
        if deaths < DEATHS_UNTIL_DEADLY:
            return False
        rest = min(2 * self._rests[key][0], LONGEST_REST) if key in self._rests else FIRST_REST
        self._rests[key] = (rest, now + rest)
        return True

    def spared(self, member: str, id: str, version: str, now: float) -> bool:
        """Whether a replica must not be asked to load a version yet."""
        return now < self._rests.get((member, id, version), (0.0, now))[1]

    def loaded(self, member: str, id: str, version: str) -> None:
        """A replica has loaded a version: whatever ended its process before, it was not the version, or is mended."""
        self._deaths.pop((member, id, version), None)
        self._rests.pop((member, id, version), None)
