"""The controller's ports on the simulated network: what is sent may come late or twice; members know its order."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sim.loop import Killed

from expertmesh.cluster.control.messages import Candidate, Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.experts.errors import ExpertMeshError, Unavailable
from expertmesh.experts.staging.stage import Receipt
from expertmesh.router.fanout.replica_view import READY, Replica

if TYPE_CHECKING:
    from sim.controller import ControllerProcess

CALL_TIMEOUT = 4.0
"""After so many seconds the transport gives a call up, where nobody has given it up before."""


class Line:
    """One controller's way to all members."""

    def __init__(self, process: ControllerProcess) -> None:
        self._process = process

    async def call(self, target: str, method: str, *arguments: Any) -> Any:
        """The answer of another process. Raises Unavailable where none comes, and the error that is the answer."""
        if not self._process.alive:
            raise Killed
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done = partial(_settle, answer)
        self._process.world.network.call(self._process, target, method, arguments, done, CALL_TIMEOUT)
        result = await answer
        if result is None:
            raise Unavailable(f"{target} does not answer")
        if isinstance(result, ExpertMeshError):
            raise result
        return result

    async def stage(self, order: Order, target: str, candidate: Candidate) -> Receipt:
        """Have a candidate of a swap staged, or a version loaded that there is."""
        loads = candidate.version is not None and candidate.replaces is None
        step = "load" if loads else "stage"
        self._process.reach(step, "before")
        receipt: Receipt = await self.call(target, "stage", order, step, candidate)
        return receipt

    async def unload(self, order: Order, target: str, id: str, version: str) -> None:
        """Have a version forgotten."""
        self._process.reach("unload", "before")
        await self.call(target, "unload", order, id, version)


class RouterPort:
    """The way to the routers."""

    def __init__(self, process: ControllerProcess, line: Line) -> None:
        self._process = process
        self._line = line

    async def declare(self, router: str, handle: Any, desired: Desired) -> None:
        """Hand over the declared layers."""
        await self._line.call(router, "declare", desired)

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        """Hand over what is known."""
        self._process.reach("sync", "before")
        report: RouterReport = await self._line.call(router, "sync", order, update)
        self._process.reach("sync", "reported")
        return report

    async def stage(self, order: Order, router: str, handle: Any, candidate: Candidate) -> Receipt:
        """Have a gate staged."""
        return await self._line.stage(order, router, candidate)

    async def unload(self, order: Order, router: str, handle: Any, id: str, version: str) -> None:
        """Have a gate forgotten."""
        await self._line.unload(order, router, id, version)


class ReplicaPort:
    """The way to the replicas."""

    def __init__(self, line: Line) -> None:
        self._line = line

    async def probe(self, order: Order, replica_id: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
        """Ask for a report."""
        incarnation, ids, holds = await self._line.call(replica_id, "report", order, given_up)
        return Replica(replica_id, tuple(sorted(ids)), incarnation, holds, READY)

    async def stage(self, order: Order, replica_id: str, handle: Any, candidate: Candidate) -> Receipt:
        """Have an expert staged."""
        return await self._line.stage(order, replica_id, candidate)

    async def waits_for(self, needs: Mapping[str, float]) -> str:
        return ""

    async def unload(self, order: Order, replica_id: str, handle: Any, id: str, version: str) -> None:
        """Have a version forgotten."""
        await self._line.unload(order, replica_id, id, version)


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)
