"""Carries out what the controller decides (stage, load, unload, commit), and tells `Reconciler` the outcome."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ...experts.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    Fenced,
    NotFound,
    Unavailable,
)
from ...experts.staging.stage import Receipt
from .events import Action, CommitSwap, FinishSwap, LoadVersion, StageCandidate, Sync, UnloadVersion
from .messages import Candidate
from .orders import Order
from .ports import ReplicaPort, RouterPort
from .reconciler import Reconciler
from .replica_health import DEATHS_UNTIL_DEADLY, DeadlyVersions, Health
from .swap_transactions import SwapTransactions

log = logging.getLogger(__name__)
COMMIT_SECONDS = 0.2
ENDED_KEPT = 256
PROBE_TIMEOUT = 2.0
LOAD_SECONDS = 600.0
UNLOAD_SECONDS = 30.0
LATE_SECONDS = 30.0
"""So long after its swap has run out of time a member may still stage: what others ask of it waits."""
LASTING = (DataLoss, FailedPrecondition, NotFound)
"""What is wrong with a stored version when another try will hardly help."""
LASTING_SECONDS = 5.0
"""So long it is before that other try."""


class Executor:
    """Carries out actions. `handles` is how replicas are reached, `problem` the last load that failed.

    `problems` are the (id, version) whose last load failed, with the error, and `deadly` those that end processes.
    `ended` are incarnations of replicas that are not wanted any more: what becomes of them says nothing of a version.
    Epochs are collected, and recalled, by one who holds `collecting`. `background` are threads of the lowest priority.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        transactions: SwapTransactions,
        health: Health,
        router: RouterPort,
        replicas: ReplicaPort,
        sync: Callable[[], Coroutine[Any, Any, None]],
        background: ThreadPoolExecutor,
    ) -> None:
        self.reconciler = reconciler
        self.transactions = transactions
        self.handles: Mapping[str, Any] = {}
        self.routers: Mapping[str, Any] = {}
        self.problem = "it is still loading"
        self.problems: dict[tuple[str, str], ExpertMeshError] = {}
        self.deadly = DeadlyVersions()
        self.ended: deque[str] = deque(maxlen=ENDED_KEPT)
        self._health = health
        self._router = router
        self._replicas = replicas
        self._sync = sync
        self._changed: dict[str, float] = {}
        self._unloading: Counter[str] = Counter()
        self._orders = itertools.count(1)
        self.collecting = asyncio.Lock()
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._background = background

    def broken(self, versions: Mapping[str, str]) -> dict[str, str]:
        """The ids of these versions whose stored version cannot be loaded by trying again, and why, by id."""
        found = {id: self.problems.get((id, version)) for id, version in versions.items()}
        return {id: error.message for id, error in found.items() if isinstance(error, LASTING)}

    def changed_since(self, member: str, moment: float) -> bool:
        """Whether a member has come to hold or forget something since then (a time of the event loop), or is about to
        forget something: what it reported meanwhile may be old."""
        return self._unloading[member] > 0 or self._changed.get(member, 0.0) > moment

    def order(self) -> Order:
        """The place of the next order to a member."""
        return Order(self.transactions.term, next(self._orders))

    async def perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions, what takes time in a task of its own."""
        for action in actions:
            if isinstance(action, StageCandidate):
                self.spawn(self._in_turn(action.member, self._stage(action)))
            elif isinstance(action, LoadVersion):
                self.spawn(self._in_turn(action.member, self._load(action)))
            elif isinstance(action, UnloadVersion):
                self.spawn(self._in_turn(action.member, self._unload(action)))
            elif isinstance(action, CommitSwap):
                self.spawn(self._commit(action))
            elif isinstance(action, Sync):
                self.spawn(self._sync())
            elif isinstance(action, FinishSwap):
                self.transactions.answer(action.swap_id, action.epoch, action.error)

    async def _in_turn(self, member: str, work: Coroutine[Any, Any, None]) -> None:
        """One action to a member after the other: an unload must not overtake, or be overtaken by, a later load."""
        async with self._turns.setdefault(member, asyncio.Lock()):
            await work

    async def _stage(self, action: StageCandidate) -> None:
        try:
            await self._try_to_stage(action)
        finally:
            if action.incarnation in self.ended:  # another may have waited for what becomes of it
                await self.perform(self.reconciler.not_reached(action.swap_id, action.member, action.id))

    async def _try_to_stage(self, action: StageCandidate) -> None:
        member, incarnation, swap_id, id = action.member, action.incarnation, action.swap_id, action.id
        candidate = self.transactions.candidate(swap_id, id)
        if candidate is None:
            return  # the swap has ended while this waited for its turn
        reached = await self._lives(member, incarnation)
        try:
            timeout = self.transactions.timeout(swap_id) + LATE_SECONDS
            receipt = await self._staged_at(member, candidate, timeout)
            _check_tensors(member, candidate, receipt)
            self.transactions.keep_receipt(swap_id, receipt)
        except Unavailable:
            if reached and incarnation not in self.ended and not await self._lives(member, incarnation):
                await self.perform(self.reconciler.died_staging(swap_id, member, id))
            else:
                await self.perform(self.reconciler.not_reached(swap_id, member, id))
        except ExpertMeshError as error:
            await self.perform(self.reconciler.stage_refused(swap_id, member, incarnation, id, error))
        except (asyncio.TimeoutError, TimeoutError):
            late = DeadlineExceeded(f"{id}: {member} did not stage it in time")
            await self.perform(self.reconciler.stage_refused(swap_id, member, incarnation, id, late))
        except Exception as error:
            refusal = FailedPrecondition(f"{id}: staging at {member} failed with {type(error).__name__}; see the log")
            await self.perform(self.reconciler.stage_refused(swap_id, member, incarnation, id, refusal))
            raise
        else:
            self._holds(member, incarnation, id, receipt.version)
            await self.perform(self.reconciler.staged(swap_id, member, incarnation, id, receipt.version))

    async def _lives(self, member: str, incarnation: str) -> bool:
        """Whether a replica is reached right now, in this incarnation."""
        return await self._incarnation(member) == incarnation

    async def _incarnation(self, member: str) -> str | None:
        """The incarnation of a replica that is reached right now; None if it is down, empty if that is not known."""
        if member in self.routers:
            return ""
        try:
            probe = self._replicas.probe(self.order(), member, self.handles.get(member), {})
            return (await asyncio.wait_for(probe, PROBE_TIMEOUT)).incarnation
        except ExpertMeshError:
            return None
        except (asyncio.TimeoutError, TimeoutError):
            return ""

    async def _load(self, action: LoadVersion) -> None:
        if self.deadly.spared(action.member, action.id, action.version, asyncio.get_running_loop().time()):
            self.reconciler.load_failed(action.member, action.incarnation, action.id, action.version)
            return
        before = await self._incarnation(action.member)
        try:
            if before is None:
                raise Unavailable(f"{action.member} is down")
            candidate = await asyncio.to_thread(self.transactions.recorded, action.id, action.version)
            receipt = await self._staged_at(action.member, candidate, LOAD_SECONDS)
            if receipt.version != action.version:
                raise FailedPrecondition(
                    f"{action.id} loads as {receipt.version}, not {action.version}: its code changed"
                )
        except ExpertMeshError as failure:
            error = await self._cause(action, failure, before)
            self.problem = error.message
            if isinstance(error, LASTING) or not isinstance(self.problems.get((action.id, action.version)), LASTING):
                self.problems[action.id, action.version] = error
            log.warning("%s could not load %s %s: %s", action.member, action.id, action.version, error)
            failed = (action.member, action.incarnation, action.id, action.version)
            delay = LASTING_SECONDS if isinstance(error, LASTING) else 0.0
            asyncio.get_running_loop().call_later(delay, self.reconciler.load_failed, *failed)
        except Exception:  # a disk that fails, a member that is late, a bug: it is tried again, and seen in the log
            self.reconciler.load_failed(action.member, action.incarnation, action.id, action.version)
            raise
        else:
            self.problems.pop((action.id, action.version), None)
            self._holds(action.member, action.incarnation, action.id, action.version)
            await self.perform(self.reconciler.loaded(action.member, action.incarnation, action.id, action.version))

    async def _cause(self, action: LoadVersion, failure: ExpertMeshError, before: str | None) -> ExpertMeshError:
        """Why a version could not be loaded: it is damaged, or it ends processes, as it did that of `before`."""
        if isinstance(failure, Unavailable) and before and before != await self._incarnation(action.member):
            now = asyncio.get_running_loop().time()
            return _deadly(action) if self.deadly.died(action.member, action.id, action.version, now) else failure
        if isinstance(failure, LASTING):
            try:
                await asyncio.to_thread(self.transactions.verify, action.id, action.version)
            except (DataLoss, NotFound) as damage:
                return damage
        return failure

    async def _unload(self, action: UnloadVersion) -> None:
        member, id, version, loop = action.member, action.id, action.version, asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.transactions.check_writer)  # another controller may need it by now
        except ExpertMeshError as error:
            log.debug("%s was not told to unload %s %s: %s", member, id, version, error)
            return
        if not self.reconciler.begin_unload(member, action.incarnation, id, version):
            return
        self._unloading[member] += 1
        self._health.forgets(member, id, version)
        try:
            await asyncio.wait_for(self._unloaded_at(member, id, version), UNLOAD_SECONDS)
        except (ExpertMeshError, asyncio.TimeoutError, TimeoutError) as error:
            log.debug("%s did not unload %s %s: %s", member, id, version, error)
        finally:
            self._unloading[member] -= 1
            self._changed[member] = loop.time()

    async def _unloaded_at(self, member: str, id: str, version: str) -> None:
        if member in self.routers:
            await self._router.unload(self.order(), member, self.routers[member], id, version)
        else:
            await self._replicas.unload(self.order(), member, self.handles.get(member), id, version)

    async def _staged_at(self, member: str, candidate: Candidate, timeout: float) -> Receipt:
        if member in self.routers:
            staged = self._router.stage(self.order(), member, self.routers[member], candidate)
        else:
            limited = replace(candidate, timeout=timeout)  # the replica, too, must know when it hangs
            staged = self._replicas.stage(self.order(), member, self.handles.get(member), limited)
        return await asyncio.wait_for(staged, timeout)

    async def _commit(self, action: CommitSwap) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._background, self.transactions.write, action.swap_id, action.versions)
            epoch, versions = await self._decided(action)
        except Fenced as error:  # whether it is durable, only the controller that took over can say
            self.transactions.answer(
                action.swap_id, None, Unavailable(f"{error.message}: ask again with the same swap id")
            )
        except ExpertMeshError as error:
            await self.perform(self.reconciler.commit_refused(action.swap_id, error))
        except Exception as error:
            refusal = ExpertMeshError(f"the commit failed with {type(error).__name__}; see the log")
            await self.perform(self.reconciler.commit_refused(action.swap_id, refusal))
            raise
        else:
            await self.perform(self.reconciler.committed(action.swap_id, epoch, versions))
            self.spawn(self._collect())

    async def _decided(self, action: CommitSwap) -> tuple[int, Mapping[str, str]]:
        """Commit, and where the disk does not say whether that is durable, ask until it does: nothing else can tell."""
        while True:
            try:
                return await asyncio.to_thread(self.transactions.commit, action.swap_id, action.versions)
            except Unavailable as error:
                log.warning("whether swap %s is committed is not known yet: %s", action.swap_id, error)
            await asyncio.sleep(COMMIT_SECONDS)

    async def _collect(self) -> None:
        async with self.collecting:
            in_use = {pair for versions in self.reconciler.in_use() for pair in versions.items()}
            self.reconciler.forget_epochs(
                await asyncio.to_thread(self.transactions.collect, in_use, self.reconciler.oldest_needed())
            )

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work of its own accord; what goes wrong with it is logged."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _holds(self, member: str, incarnation: str, id: str, version: str) -> None:
        self._changed[member] = asyncio.get_running_loop().time()
        self._health.holds(member, incarnation, id, version)
        self.deadly.loaded(member, id, version)


def _deadly(action: LoadVersion) -> FailedPrecondition:
    return FailedPrecondition(
        f"{action.id} {action.version}: {DEATHS_UNTIL_DEADLY} processes of {action.member} ended while they loaded it: "
        "its constructor or its code ends them, or they run out of memory; see the log, and swap in another version"
    )


def _check_tensors(member: str, candidate: Candidate, receipt: Receipt) -> None:
    """Hold a receipt against the file that was sent: on its way to a member it may have been taken for another."""
    if candidate.tensor_digest not in (None, receipt.tensor_digest):
        raise DataLoss(f"{candidate.id}: {member} has staged other tensors than those that were sent to it; try again")


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except (ExpertMeshError, asyncio.TimeoutError, TimeoutError) as error:
        log.warning("%s", error)
    except Exception:  # nobody waits for this task: a bug of ours must be seen, and must not end the watch
        log.exception("the controller could not carry out an action")
