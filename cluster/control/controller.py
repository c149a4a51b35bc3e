"""The controller: compares what is to be with what is, and acts. Never on the path of a request.

It decides nothing itself: `Reconciler` does. This shell probes, carries out actions, and owns the registry. Every turn
it asks all replicas what they hold and tells the router; so it does not matter which of them restarted, or what was
lost.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...experts.errors import ExpertMeshError, Fenced, Unavailable
from ...experts.names import is_layer_id
from ...router.fanout.replica_view import READY
from ..machine.process_tuning import background
from ..placement.autoscale_turns import rules_of
from ..state.registry import Registry
from ..state.version_folders import VersionStore
from .candidates import CandidateBuilder
from .events import Action
from .executor import PROBE_TIMEOUT, Executor
from .messages import Desired, SwapRequest, SwapResult
from .ports import ControllerState, ReplicaPort, RouterPort, StateSettings
from .reconciler import Reconciler
from .replica_health import Health, Probe
from .routers.follow import Routers
from .swap_transactions import SwapTransactions

log = logging.getLogger(__name__)
TURN_SECONDS = 0.5
DRAIN_SECONDS = 0.02
WRITER_SECONDS = 1.0


class Controller:
    """Keeps routers and replicas at what the registry says, and carries out swaps."""

    def __init__(self, transactions: SwapTransactions, router: RouterPort, replicas: ReplicaPort) -> None:
        self.incarnation = uuid.uuid4().hex
        self.desired = Desired()
        self.transactions = transactions
        self.reconciler = Reconciler()
        self.problem = ""
        self._replicas = replicas
        self._health = Health()
        self._background = background("versions")
        self.executor = Executor(
            self.reconciler, transactions, self._health, router, replicas, self._sync, self._background
        )
        self.routers = Routers(router, self.reconciler, self.executor, self._health, self._broken, self._hurry)
        self._next_probe = 0.0
        self._turn = asyncio.Lock()
        self._drains = asyncio.Event()
        self._syncing = asyncio.Lock()
        self._built = self._declared = 0
        self._taken = 0.0
        self._added: frozenset[str] = frozenset()
        self._recalls: Counter[int] = Counter()
        self._declaring = asyncio.Lock()

    async def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Take what the owner declares, and bring everything there; returns the versions that then serve.

        What the registry knows and the declaration has not changed is loaded as it was; what is new or edited becomes a
        new version, all of it in one swap. A version that was swapped in is replaced only if `redeclare` has its id.
        An expert whose stored version is damaged stays out, and the others serve. Raises what is wrong with the first
        of them where all are.
        """
        async with self._declaring:
            if desired.revision > self.desired.revision:
                self.reconciler.check_unused(desired.ends)
                await self._take(desired)
            self._next_probe = 0.0
            deadline = asyncio.get_running_loop().time() + timeout
            await self._until(self._all_there, deadline)
            await self.turn()
            if self._built < self.desired.declaration:
                request = await asyncio.to_thread(self.transactions.declared_swap, timeout, self.desired)
                if request is not None:
                    await self.swap(request)  # to its end: another declaration would bring the same once more
                self._built = self.desired.declaration
            await asyncio.to_thread(self.transactions.registry.set_replicas, dict(self.desired.scaled))
            self._declared = self.desired.revision
            await self._until(self._at_rest, deadline)
            self._check_something_serves()
            try:
                await self._until(self._drained, deadline)
            except Unavailable as error:
                log.warning("replicas are ended although they may compute: %s", error)
        return self._serving()

    async def _take(self, desired: Desired) -> None:
        """Take what is newer. A replica that drains, or is not wanted any more, is no member: nobody waits for it."""
        before, self.desired = self.desired, desired
        self._taken = asyncio.get_running_loop().time()
        self._added = frozenset(desired.replicas.keys() - before.replicas.keys())
        self.executor.handles = desired.handles
        self.routers.expect(desired)
        self._health.expect(dict(desired.replicas), desired.draining)
        actions: list[Action] = []
        members, gone = self.reconciler.members(), before.replicas.keys() - desired.replicas.keys()
        for name in gone:
            self.routers.leases.down(name)
        for name in sorted(members.keys() & (gone | desired.draining)):
            self.executor.ended.append(members[name])
            actions += self.reconciler.member_lost(name)
        if desired.declaration > before.declaration:
            self.transactions.declare(desired)
            self.routers.autoscaling.rules = rules_of(desired.layers.values())
            self.reconciler.declared = frozenset(self.transactions.builder.declared)
            routers = [] if self.reconciler.epochs else [*self.routers.handles]  # what it pins is not known yet
            actions += self.reconciler.restore(self.transactions.epochs(), routers)
        await self.executor.perform(actions)

    async def swap(self, request: SwapRequest) -> SwapResult:
        """Carry out a swap; returns when it is durable and all routers have adopted it.

        The same swap id again gives the same result. Raises what the table of swap failures says.
        """
        done = self.transactions.result_of(request.swap_id)
        if done is not None and not self.transactions.is_awaited(request.swap_id):
            return await self._flipped(done, request.timeout)
        self._check_told()
        ids = frozenset(request.changes)
        asked_before = self.transactions.is_awaited(request.swap_id)
        answer = self.transactions.expect_answer(request.swap_id)
        if not asked_before:
            try:
                await asyncio.get_running_loop().run_in_executor(self._background, self.transactions.prepare, request)
                if self.reconciler.swaps.draining():  # one of the same expert may have drained since that was looked at
                    await self._sync()
                new_code = frozenset(id for id, change in request.changes.items() if change.new_code)
                actions = self.reconciler.swap_asked(request.swap_id, ids, new_code)
            except ExpertMeshError as error:
                self.transactions.abort(request.swap_id, error)
                raise
            except Exception as error:
                failure = ExpertMeshError(f"preparing failed with {type(error).__name__}")
                self.transactions.abort(request.swap_id, failure)
                raise
            timer = asyncio.get_running_loop().call_later(request.timeout, self._time_up, request.swap_id)
            self.transactions.on_answer(request.swap_id, timer.cancel)
            await self.executor.perform(actions)
        return await asyncio.shield(answer)

    async def _flipped(self, done: SwapResult, timeout: float) -> SwapResult:
        """The result of a swap that was committed before, once the routers have adopted it, or what it waits for."""
        deadline = asyncio.get_running_loop().time() + timeout
        while not self.desired.revision or self.routers.behind(done.epoch):
            if asyncio.get_running_loop().time() > deadline:
                return replace(done, flipped=False, pending=tuple(self.routers.behind(done.epoch)))
            await asyncio.sleep(DRAIN_SECONDS)
        return done

    async def recall(self, epoch: int, ttl: float) -> None:
        """Load the versions of an epoch that is kept, and keep them for `ttl` seconds from then on.

        Raises FailedPrecondition beyond retention, NotFound for an epoch that never was, and Unavailable where it could
        not be loaded in that time, or nothing was declared yet.
        """
        self._check_told()
        async with self.executor.collecting:
            versions = self.transactions.epoch(epoch)
            self.transactions.builder.check_runs(epoch, versions, self.desired.stays)
            self.reconciler.epochs.setdefault(epoch, versions)
            self._recalls[epoch] += 1
            actions = self.reconciler.recall(epoch)
        loop = asyncio.get_running_loop()
        try:
            deadline = loop.time() + ttl
            await self.executor.perform(actions)
            while self.reconciler.lacking(epoch):
                if loop.time() > deadline:
                    raise Unavailable(f"epoch {epoch} could not be loaded: {self.executor.problem}")
                await asyncio.sleep(DRAIN_SECONDS)
            await self._all_told()
        except BaseException:
            self._release(epoch)
            raise
        loop.call_later(ttl, self._release, epoch)

    async def _all_told(self) -> None:
        """Tell every router what is known now; one that turns out not to answer is not waited for."""
        began = asyncio.get_running_loop().time()
        await self._sync()
        while self.routers.untold(began):
            await asyncio.sleep(DRAIN_SECONDS)
            await self._sync()

    def _release(self, epoch: int) -> None:
        """Let an epoch go that was recalled, unless another recall of it still runs."""
        self._recalls[epoch] -= 1
        if not self._recalls[epoch]:
            self.executor.spawn(self.executor.perform(self.reconciler.release(epoch)))

    async def run(self) -> None:
        """Take turns until another controller takes over.

        From a swap's commit until no request needs what it replaced, they follow in quick succession.
        """
        while True:
            try:
                await self.turn()
            except Fenced as error:
                log.warning("%s: it takes no more turns. Clusters need a state_dir each", error)
                self.problem = error.message
                return
            except (ExpertMeshError, asyncio.TimeoutError, TimeoutError) as error:
                log.warning("the router was not reached: %s", error)
            except Exception:  # the watch must go on
                log.exception("a turn of the controller failed")
            await self._pause()

    def _hurry(self) -> None:
        """Take the next turns in quick succession, where a swap drains."""
        if self.reconciler.swaps.draining():
            self._drains.set()

    async def _pause(self) -> None:
        """Wait for the next turn. A swap that only stages needs none: they would hold up the flip, and the router."""
        if self.reconciler.swaps.draining():
            await asyncio.sleep(DRAIN_SECONDS)
            return
        self._drains.clear()
        with suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._drains.wait(), TURN_SECONDS)

    async def turn(self) -> None:
        """One turn: probe every replica, then tell the router. Raises Unavailable when it cannot be reached."""
        async with self._turn:
            desired = self.desired
            if not desired.revision:
                return
            now = asyncio.get_running_loop().time()
            if now >= self._next_probe:
                self._next_probe = now + TURN_SECONDS
                await self._probe_all()
            await self._sync()
            wanted = desired.replicas.keys() - desired.draining
            for decision in self.routers.autoscaling.turn(now, wanted, self._health.replicas()):
                log.info("autoscale: %s", decision)

    def close(self) -> None:
        """Close the registry."""
        self._background.shutdown(wait=False, cancel_futures=True)
        self.transactions.close()

    def state(self) -> ControllerState:
        """What is known here."""
        return ControllerState(
            revision=self._declared,
            epoch=self.reconciler.current,
            versions=self._serving(),
            used=self.reconciler.used(),
            current=self.reconciler.epochs.get(self.reconciler.current, {}),
            replicas=self._health.replicas(),
            routers=self.routers.facts(),
            kept=dict(self.transactions.kept),
            broken=self._broken(),
            resumed=self.transactions.resumed,
            swapped=dict(self.transactions.swapped),
            edited=self.transactions.edited,
            asked=self.routers.autoscaling.asked_by(self.incarnation),
        )

    def _serving(self) -> dict[str, str]:
        """The versions of the experts and gates that serve."""
        return {id: version for id, version in self.reconciler.serving().items() if not is_layer_id(id)}

    def _broken(self) -> dict[str, str]:
        """The ids whose current version cannot be loaded, and why."""
        return self.executor.broken(self.reconciler.serving())

    def history(self, id: str) -> list[dict[str, Any]]:
        """The versions of an id that are kept, oldest first, and which epochs name them. Raises NotFound."""
        self._check_told()
        return self.transactions.builder.history(id)

    async def declared(self) -> dict[str, Any]:
        """The document of what is declared. Raises Unavailable."""
        self._check_told()
        wanted = self.desired.replicas.keys() - self.desired.draining
        return await asyncio.to_thread(self.transactions.builder.document, self.desired.settings, wanted)

    def progress(self, swap_id: str) -> dict[str, Any]:
        """How far a swap is: its phase, receipts there and needed. Raises NotFound for one that is not known."""
        swap = self.reconciler.swaps.find(swap_id)
        if swap is None:
            return self.transactions.ended(swap_id)
        there, needed = swap.receipts()
        return {"swap_id": swap_id, "phase": swap.phase.value, "receipts": there, "needed": needed}

    def _check_told(self) -> None:
        """Raise Unavailable, and not that there is no such expert, where nothing was declared since the restart."""
        if not self.desired.revision:
            raise Unavailable("the controller is restarting; retry in a moment")

    def _time_up(self, swap_id: str) -> None:
        self.executor.spawn(self.executor.perform(self.reconciler.time_up(swap_id)))

    async def _until(self, done: Callable[[], str], deadline: float) -> None:
        """Take turns until `done` has nothing to complain of. Raises Unavailable with the complaint at the deadline."""
        while complaint := done():
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"not ready in time: {complaint}")
            await asyncio.sleep(DRAIN_SECONDS)
            await self.turn()

    def _all_there(self) -> str:
        scales = self._built == self.desired.declaration  # then others, which may be down, have no part in it
        awaited = (self._added if scales else frozenset(self.desired.replicas)) - self.desired.draining
        missing = [
            replica.id for replica in self._health.replicas() if replica.id in awaited and replica.state != READY
        ]
        return f"replica {missing[0]} has not started" if missing else ""

    def _at_rest(self) -> str:
        if not self.reconciler.current:
            return "there is no epoch yet"
        if behind := self.routers.behind(self.reconciler.current, self.desired.routers):
            return f"{behind[0]} has not adopted the epoch"
        broken = self._broken()
        lacking = [entry for entry in self.reconciler.incomplete() if entry[1] not in broken]
        return (
            f"{lacking[0][0]} does not hold {lacking[0][1]} {lacking[0][2]}: {self.executor.problem}" if lacking else ""
        )

    def _drained(self) -> str:
        draining = self.desired.draining
        users = self.routers.users(draining, self._taken) if draining else []
        return f"{users[0]} may still use {min(draining)}" if users else ""

    def _check_something_serves(self) -> None:
        """Raise what is wrong with the first expert, where no expert can be loaded."""
        broken, versions = self._broken(), self.reconciler.serving()
        experts = sorted(id for layer in self.desired.layers.values() for id in layer.everyone_by_id)
        if broken.keys() >= set(experts):
            raise self.executor.problems[experts[0], versions[experts[0]]]

    async def _probe_all(self) -> None:
        handles = self.desired.handles
        await asyncio.gather(*(self._probe(name, handles.get(name)) for name in self.desired.replicas))

    async def _probe(self, name: str, handle: Any) -> None:
        began = asyncio.get_running_loop().time()
        given_up = self.routers.leases.given_up
        try:
            probe = self._replicas.probe(self.executor.order(), name, handle, given_up)
            report = await asyncio.wait_for(probe, PROBE_TIMEOUT)
            self.routers.leases.told(name, given_up)
        except Fenced:
            raise
        except ExpertMeshError:
            self.routers.leases.down(name)
            problem = await self._replicas.waits_for(self.desired.needs.get(name, {}))
            self._health.probed(name, Probe(failure="down", problem=problem))
            await self.executor.perform(self.reconciler.member_lost(name))
        except (asyncio.TimeoutError, TimeoutError):
            self._health.probed(name, Probe(failure="timeout"))
        else:
            if self.executor.changed_since(name, began):
                return  # it may have reported before what it has loaded or forgotten since
            self._health.probed(name, Probe(report))
            if name not in self.desired.replicas or name in self.desired.draining:
                return
            ids = frozenset(self.desired.replicas.get(name, ()))
            await self.executor.perform(self.reconciler.member_reported(name, report.incarnation, ids, report.holds))

    async def _sync(self) -> None:
        """Tell every router what is known. Raises what went wrong with the first of them where none was reached."""
        async with self._syncing:
            with suppress(asyncio.TimeoutError, TimeoutError):  # a slow disk says nothing, and must not hold up routers
                await asyncio.wait_for(asyncio.to_thread(self.transactions.check_writer), WRITER_SECONDS)
            if not self._health.all_asked():
                return
            if self.routers.given_up_now():
                await self._probe_all()
            await self.routers.leave()
            await self.routers.tell()


def open_controller(settings: StateSettings, router: RouterPort, replicas: ReplicaPort) -> Controller:
    """Open the registry, taking it over from whoever had it, and make a controller of it."""
    registry = Registry(settings.state_dir)
    try:
        store = VersionStore(settings.state_dir)
        builder = CandidateBuilder(registry, store)
        transactions = SwapTransactions(registry, store, builder, retain_epochs=settings.retain_epochs)
    except BaseException:
        registry.close()
        raise
    return Controller(transactions, router, replicas)
