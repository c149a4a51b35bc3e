"""Tells every router what is known, and takes what it reports: one that does not answer holds up no other."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ....experts.errors import ExpertMeshError, Fenced
from ...placement.autoscale_turns import Autoscaling
from ..events import Action
from ..executor import Executor
from ..messages import Desired, RouterReport, RouterUpdate
from ..ports import RouterPort
from ..reconciler import Reconciler
from ..replica_health import Health
from .leases import RouterLeases

log = logging.getLogger(__name__)
ROUTER_TIMEOUT = 5.0
SLOW_SECONDS = 0.5
"""How long a turn waits for routers that do not answer; they are waited for beside it."""
LEASE_SECONDS = 10.0
"""How long a router is not heard before it is given up."""
REMEMBERED = 256
"""How many routers that had joined are remembered as given up."""
ROUNDS = 3
"""How often a router is told in a row, at most: before it knows the layers, and before its session is known."""
REACHED_NOT = (ExpertMeshError, asyncio.TimeoutError, TimeoutError)


class Routers:
    """The routers of a cluster, by name: those that the owner declares, and those that have joined by themselves.

    `handles` is how each is reached. `hurry` is called where what a router reports may let a swap go on.
    """

    def __init__(
        self,
        port: RouterPort,
        reconciler: Reconciler,
        executor: Executor,
        health: Health,
        broken: Callable[[], Mapping[str, str]],
        hurry: Callable[[], None],
    ) -> None:
        self.reports: dict[str, RouterReport] = {}
        self.autoscaling = Autoscaling()
        self.leases = RouterLeases(LEASE_SECONDS)
        self.desired = Desired()
        self.handles: dict[str, Any] = {}
        self._joined: dict[str, tuple[Any, Callable[[], None]]] = {}
        self._given_up: deque[str] = deque(maxlen=REMEMBERED)
        self._port = port
        self._reconciler = reconciler
        self._executor = executor
        self._health = health
        self._broken = broken
        self._hurry = hurry
        self._states: dict[str, str] = {}
        self._told: dict[str, asyncio.Task[None]] = {}
        self._told_at: dict[str, float] = {}

    def expect(self, desired: Desired) -> None:
        """Take which routers there are to be."""
        self.desired = desired
        self._expect()

    async def join(self, name: str, handle: Any, gone: Callable[[], None], *, fresh: bool) -> None:
        """Tell a router that the owner does not declare from now on, too.

        Once it has left, or is given up, `gone` is called. It has served nothing yet if it is `fresh`.
        """
        if name in self._given_up:
            self._given_up.remove(name)  # it has a lease again
        self._joined[name] = handle, gone
        self._expect()
        await self._executor.perform(self._reconciler.router_joined(name, fresh=fresh))

    async def left(self, name: str) -> None:
        """A router that had joined serves nothing any more, and says so itself; all others stay."""
        if name in self._joined:
            self._drop(name)
            self._expect()
            await self._executor.perform(self._lost(name))

    def facts(self) -> dict[str, dict[str, Any]]:
        """The facts of every router by name, as it last reported them, and its state."""
        return {
            name: {
                **(self.reports[name].facts if name in self.reports else {}),
                "state": self._states.get(name, "starting"),
            }
            for name in self.handles
        }

    def behind(self, epoch: int, names: Iterable[str] | None = None) -> list[str]:
        """The routers, all or these, that may answer and have not adopted an epoch."""
        there = [name for name in (self.handles if names is None else names) if name not in self.leases.gone]
        return [name for name in there if (report := self.reports.get(name)) is None or report.epoch < epoch]

    def untold(self, since: float) -> list[str]:
        """The routers that answered when they were last asked, and were told nothing since then, in the loop's time."""
        ready = [name for name in self.handles if self._states.get(name) == "ready"]
        return [name for name in ready if self._told_at.get(name, 0.0) < since]

    def users(self, replicas: frozenset[str], since: float) -> list[str]:
        """The routers that may still send something to these replicas, or wait for an answer of one.

        Those that were told nothing since then, in the loop's time, may do so.
        """
        there = [name for name in self.handles if name not in self.leases.gone]
        told = [name for name in there if self._told_at.get(name, -math.inf) >= since and name in self.reports]
        return [name for name in there if name not in told or self.reports[name].busy & replicas]

    def given_up_now(self) -> bool:
        """Give up the routers that were not heard for too long; whether there are any, of which replicas must hear."""
        silent = self.leases.tick(asyncio.get_running_loop().time())
        for name in silent:
            log.warning("%s is given up: it was not heard for %g s", name, LEASE_SECONDS)
            self._states[name] = "given up"
        return bool(silent)

    async def leave(self) -> None:
        """Forget what the routers pin that are given up, once every replica that is not down refuses them."""
        for name in self.leases.leave(self.desired.replicas):
            if name in self._joined:
                self._given_up.append(name)  # a replica that is down has still to hear of it
                self._drop(name)
                self._expect()
            self.reports.pop(name, None)
            await self._executor.perform(self._lost(name))

    async def tell(self) -> None:
        """Tell all routers at once. Raises what went wrong with the first of them where none was reached."""
        late = self._ended()
        loop = asyncio.get_running_loop()
        free = [name for name in self.handles if name not in self._told]
        told = [loop.create_task(self._tell(name, self.handles[name])) for name in free]
        self._told.update(zip(free, told, strict=True))
        if told:
            await asyncio.wait(told, timeout=SLOW_SECONDS)
        failures = self._ended()
        for failure in (*late, *failures):
            if failure is not None and (isinstance(failure, Fenced) or not isinstance(failure, REACHED_NOT)):
                raise failure
        lost = [failure for failure in failures if failure is not None]
        if lost and len(lost) == len(self.handles):
            raise lost[0]

    def _ended(self) -> list[BaseException | None]:
        """What went wrong, or None, with each telling that has ended since this was last asked."""
        ended = [name for name, task in self._told.items() if task.done()]
        return [self._told.pop(name).exception() for name in ended]

    async def _tell(self, name: str, handle: Any) -> None:
        """Tell a router what is known, and take its report; a session that is new here is told once more.

        Only then may it answer: what it was told before may have been long on its way.
        """
        for _ in range(ROUNDS):
            update, sent = self._update(name), asyncio.get_running_loop().time()
            try:
                synced = self._port.sync(self._executor.order(), name, handle, update)
                report = await asyncio.wait_for(synced, ROUTER_TIMEOUT)
                knows_layers = report.revision >= self.desired.revision
                if not knows_layers:
                    desired = replace(self.desired, layers={})  # what a layer is made of has a version, as gates have
                    await asyncio.wait_for(self._port.declare(name, handle, desired), ROUTER_TIMEOUT)
            except REACHED_NOT as error:
                if name not in self.leases.given_up:
                    self._states[name] = "restarting" if isinstance(error, ExpertMeshError) else "unresponsive"
                self._hurry()
                raise
            if self.handles.get(name) is not handle:
                return  # it has left
            if not self.leases.heard(name, report.incarnation):
                return  # it has not noticed yet that it was given up
            await self._take(name, report, update, sent)
            if knows_layers and report.incarnation == update.session:
                self._states[name], self._told_at[name] = "ready", sent
                return

    def _expect(self) -> None:
        self.handles = {**self.desired.routers, **{name: handle for name, (handle, _) in self._joined.items()}}
        self._executor.routers = self.handles
        self.leases.expect({*self.handles, *self._given_up})

    def _drop(self, name: str) -> None:
        for known in (self.reports, self._states, self._told_at):
            known.pop(name, None)
        self.autoscaling.left(name)
        _, gone = self._joined.pop(name)
        gone()

    def _lost(self, name: str) -> list[Action]:
        return [*self._reconciler.member_lost(name), *self._reconciler.router_lost(name)]

    def _update(self, name: str) -> RouterUpdate:
        update = RouterUpdate(
            replicas=self._health.replicas(),
            epochs=self._reconciler.known_to_routers(),
            current=self._reconciler.current,
            session=self.leases.session(name),
            given_up=self.leases.given_up.get(name, ""),
            cluster_id=self._executor.transactions.cluster_id,
            broken=self._broken(),
            routers=self.facts(),
            scaled=dict(self.autoscaling.scaled),
        )
        self._reconciler.router_told(name, update.epochs)
        return update

    async def _take(self, name: str, report: RouterReport, update: RouterUpdate, sent: float) -> None:
        before = self.reports.get(name)
        self.reports[name] = report
        self.autoscaling.reported(name, report.incarnation, report.loads)
        actions: list[Action] = []
        if before is not None and before.incarnation != report.incarnation:
            actions += self._lost(name)
            self._reconciler.router_told(name, update.epochs)
        if not self._executor.changed_since(name, sent):
            declared = {id for layer in self.desired.layers.values() for id in layer.own_ids}
            ids = self._reconciler.structure() | declared
            actions += self._reconciler.member_reported(name, report.incarnation, ids, report.gates)
        actions += self._reconciler.router_reported(name, report.epoch, report.oldest_pinned, update.epochs)
        self._hurry()
        await self._executor.perform(actions)
