"""Carries out what the controller decides: staging, loading, unloading, committing; tells `Control` what came of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..experts.errors import DataLoss, ExpertMeshError, FailedPrecondition, Fenced, Unavailable
from ..experts.stage import Receipt
from .control import Answer, CommitSwap, Control, Load, Order, StageCandidate, Sync, Unload
from .controller_ports import ReplicaPort, RouterPort
from .health import Health
from .orders import Candidate
from .swap_desk import SwapDesk

log = logging.getLogger(__name__)
ROUTER = "router"
"""The router as a member: it holds gates."""


class Executor:
    """The hands of the controller. `handles` is how replicas are reached, `problem` the last load that failed.

    `background` are threads of the lowest priority.
    """

    def __init__(
        self,
        control: Control,
        desk: SwapDesk,
        health: Health,
        router: RouterPort,
        replicas: ReplicaPort,
        sync: Callable[[], Coroutine[Any, Any, None]],
        background: ThreadPoolExecutor,
    ) -> None:
        self.control = control
        self.desk = desk
        self.handles: Mapping[str, Any] = {}
        self.problem = "it is still loading"
        self._health = health
        self._router = router
        self._replicas = replicas
        self._sync = sync
        self._changed: dict[str, float] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._background = background

    def changed_since(self, member: str, moment: float) -> bool:
        """Whether a replica was told to hold or forget something since then (a time of the event loop)."""
        return self._changed.get(member, 0.0) > moment

    async def perform(self, orders: Iterable[Order]) -> None:
        """Carry out orders, what takes time in a task of its own."""
        for order in orders:
            if isinstance(order, StageCandidate):
                self.spawn(self._in_turn(order.member, self._stage(order)))
            elif isinstance(order, Load):
                self.spawn(self._in_turn(order.member, self._load(order)))
            elif isinstance(order, Unload):
                self.spawn(self._in_turn(order.member, self._unload(order)))
            elif isinstance(order, CommitSwap):
                self.spawn(self._commit(order))
            elif isinstance(order, Sync):
                self.spawn(self._sync())
            elif isinstance(order, Answer):
                self.desk.answer(order.swap_id, order.epoch, order.error)

    async def _in_turn(self, member: str, work: Coroutine[Any, Any, None]) -> None:
        """One order to a member after the other: an unload must not overtake, or be overtaken by, a later load."""
        async with self._turns.setdefault(member, asyncio.Lock()):
            await work

    async def _stage(self, order: StageCandidate) -> None:
        member, incarnation, swap_id, id = order.member, order.incarnation, order.swap_id, order.id
        try:
            candidate = self.desk.candidate(swap_id, id)
            receipt = await self._staged_at(member, candidate)
            _check_tensors(member, candidate, receipt)
            self.desk.keep_receipt(swap_id, receipt)
        except Unavailable:  # it is restarting: its next incarnation is asked anew
            await self.perform(self.control.member_lost(member))
        except ExpertMeshError as error:
            await self.perform(self.control.stage_refused(swap_id, member, incarnation, id, error))
        except Exception as error:
            refusal = FailedPrecondition(f"{id}: staging at {member} failed with {type(error).__name__}; see the log")
            await self.perform(self.control.stage_refused(swap_id, member, incarnation, id, refusal))
            raise
        else:
            self._holds(member, incarnation, id, receipt.version)
            await self.perform(self.control.staged(swap_id, member, incarnation, id, receipt.version))

    async def _load(self, order: Load) -> None:
        try:
            candidate = await asyncio.to_thread(self.desk.catalogue.recorded, order.id, order.version)
            receipt = await self._staged_at(order.member, candidate)
            if receipt.version != order.version:
                raise FailedPrecondition(
                    f"{order.id} loads as {receipt.version}, not {order.version}: its code changed"
                )
        except ExpertMeshError as error:
            self.problem = error.message
            log.warning("%s could not load %s %s: %s", order.member, order.id, order.version, error)
            self.control.load_failed(order.member, order.incarnation, order.id, order.version)
        except Exception:  # a disk that fails, a bug: it is tried again, and seen in the log
            self.control.load_failed(order.member, order.incarnation, order.id, order.version)
            raise
        else:
            self._holds(order.member, order.incarnation, order.id, order.version)
            await self.perform(self.control.loaded(order.member, order.incarnation, order.id, order.version))

    async def _unload(self, order: Unload) -> None:
        try:
            if order.member == ROUTER:
                await self._router.unload(order.id, order.version)
            else:
                self._forgets(order.member, order.id, order.version)
                handle = self.handles.get(order.member)
                await self._replicas.unload(order.member, handle, order.id, order.version)
        except ExpertMeshError as error:
            log.debug("%s did not unload %s %s: %s", order.member, order.id, order.version, error)

    async def _staged_at(self, member: str, candidate: Candidate) -> Receipt:
        if member == ROUTER:
            return await self._router.stage(candidate)
        return await self._replicas.stage(member, self.handles.get(member), candidate)

    async def _commit(self, order: CommitSwap) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._background, self.desk.write, order.swap_id, order.versions)
            epoch, versions = await asyncio.to_thread(self.desk.commit, order.swap_id, order.versions)
        except Fenced as error:  # whether it is durable, only the controller that took over can say
            self.desk.answer(order.swap_id, None, Unavailable(f"{error.message}: ask again with the same swap id"))
        except ExpertMeshError as error:
            await self.perform(self.control.commit_refused(order.swap_id, error))
        except Exception as error:
            refusal = ExpertMeshError(f"the commit failed with {type(error).__name__}; see the log")
            await self.perform(self.control.commit_refused(order.swap_id, refusal))
            raise
        else:
            await self.perform(self.control.committed(order.swap_id, epoch, versions))
            self.spawn(self._collect())

    async def _collect(self) -> None:
        in_use = {pair for versions in self.control.in_use() for pair in versions.items()}
        self.control.forget_epochs(await asyncio.to_thread(self.desk.collect, in_use, self.control.oldest_needed()))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work of its own accord; what goes wrong with it is logged."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _holds(self, member: str, incarnation: str, id: str, version: str) -> None:
        self._changed[member] = asyncio.get_running_loop().time()
        self._health.holds(member, incarnation, id, version)

    def _forgets(self, member: str, id: str, version: str) -> None:
        self._changed[member] = asyncio.get_running_loop().time()
        self._health.forgets(member, id, version)


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
        log.exception("the controller could not carry out an order")
