"""The controller: compares what is to be with what is, and tells the router. Never on the path of a request.

It is level-triggered: every turn it probes all replicas, and brings a router that is behind up to date. So it does not
matter which of them was restarted, or what was lost on the way.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..experts.errors import ExpertMeshError
from ..router.epochs import Epoch
from ..router.replicas import Replica
from .health import Health, Probe

log = logging.getLogger(__name__)
TURN_SECONDS = 0.5
PROBE_TIMEOUT = 2.0
ROUTER_TIMEOUT = 5.0


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What is to be: the epoch, and the replicas with the experts each is for; a higher revision is newer.

    `handles` is how the transport reaches each replica; the controller only passes it on.
    """

    revision: int = 0
    epoch: Epoch = field(default_factory=lambda: Epoch(0))
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()
    handles: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """What a router says of itself: what it knows, and rows that are under way to each replica."""

    incarnation: str
    revision: int
    epoch: int
    oldest_pinned: int
    rows_in_flight: Mapping[str, int]


class RouterPort(Protocol):
    """How the controller reaches a router."""

    async def apply(self, desired: Desired) -> None:
        """Take a new state of things."""

    async def sync(self, replicas: tuple[Replica, ...]) -> RouterReport:
        """Take a report of all replicas; answers with what the router knows."""


class ProbePort(Protocol):
    """How the controller reaches the replicas."""

    async def probe(self, replica_id: str, handle: Any) -> Replica:
        """Ask a replica for a report. Raises Unavailable when it is not there."""


class Controller:
    """Keeps routers informed of the replicas, and replicas under watch."""

    def __init__(self, router: RouterPort, probes: ProbePort) -> None:
        self.incarnation = uuid.uuid4().hex
        self.desired = Desired()
        self.report: RouterReport | None = None
        self._router = router
        self._probes = probes
        self._health = Health()
        self._turn = asyncio.Lock()

    async def apply(self, desired: Desired) -> None:
        """Take a newer state of things, and bring the router there before returning. Older ones change nothing."""
        if desired.revision > self.desired.revision:
            self.desired = desired
            self._health.expect(dict(desired.replicas))
        await self.turn()

    async def run(self) -> None:
        """Take turns for ever."""
        while True:
            try:
                await self.turn()
            except (ExpertMeshError, asyncio.TimeoutError, TimeoutError) as error:
                log.warning("the router was not reached: %s", error)
            except Exception:  # the border to the ports: whatever they raise, the watch goes on
                log.exception("a turn failed")
            await asyncio.sleep(TURN_SECONDS)

    async def turn(self) -> None:
        """One turn: probe every replica, then report to the router. Raises Unavailable when it cannot be reached."""
        async with self._turn:
            desired = self.desired
            if not desired.revision:
                return
            await asyncio.gather(*(self._probe(name, desired.handles.get(name)) for name in desired.replicas))
            replicas = self._health.replicas(desired.draining)
            report = await asyncio.wait_for(self._router.sync(replicas), ROUTER_TIMEOUT)
            if report.revision < desired.revision:
                await asyncio.wait_for(self._router.apply(desired), ROUTER_TIMEOUT)
                report = await asyncio.wait_for(self._router.sync(replicas), ROUTER_TIMEOUT)
            self.report = report

    def replicas(self) -> tuple[Replica, ...]:
        """Every replica as it is known now."""
        return self._health.replicas(self.desired.draining)

    async def _probe(self, name: str, handle: Any) -> None:
        try:
            report = await asyncio.wait_for(self._probes.probe(name, handle), PROBE_TIMEOUT)
        except ExpertMeshError:
            self._health.probed(name, Probe(failure="down"))
        except (asyncio.TimeoutError, TimeoutError):
            self._health.probed(name, Probe(failure="timeout"))
        else:
            self._health.probed(name, Probe(report))
