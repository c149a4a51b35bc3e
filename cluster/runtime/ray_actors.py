"""The Ray actors of experts, router and controller.

Each class only wraps an object that does not depend on Ray. Health and control calls have their own concurrency group,
so that a long computation does not delay them.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from ...experts.errors import ExpertMeshError, Fenced
from ...experts.host import ExpertHost
from ...experts.protocol import ExpertCall
from ...experts.staging.stage import Proposal, Receipt
from ...experts.tensors import from_bytes
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import report_of
from ..channel.refused import Refused
from ..channel.settings import ChannelSettings, open_channel
from ..config.layer_changes import LayersRequest
from ..control.controller import Controller, open_controller
from ..control.messages import Candidate, Desired, RouterReport, RouterUpdate, ScaleRequest, SwapRequest, SwapResult
from ..control.opening import Opening
from ..control.orders import Order, Orders
from ..control.ports import ControllerState, StateSettings
from ..control.routers.attached import AllRouters, AttachedRouters
from ..control.routers.follow import Routers
from ..control.routers.mailbox import Letter
from ..machine.logs import configure_logs
from ..machine.process_tuning import (
    give_memory_back,
    let_go,
    settle,
    take_turns_often,
    trim_memory,
    yield_to_serving,
)
from .listening import ListeningService
from .owner_desk import OwnerDesk
from .places import Place, away_from_owner, place_of
from .ray_ports import Packed, RayControlPort, RayReplicaPort, RayRouterPort
from .ray_transport import Actors, packed_reply, unpacked_call
from .router_process import ServiceSettings, Welcome


@dataclass(frozen=True)
class LogSettings:
    """The log file of a cluster's processes, and the lowest level that they log."""

    level: str
    path: str | None


log = logging.getLogger(__name__)
NAMESPACE = "expertmesh"
"""Ray's namespace of the names of controllers, each "<cluster>/<id of its start>"."""
TRIM_SECONDS = 2.0
WATCH_SECONDS = 1.0
LET_GO_SECONDS = 1.0
STDERR = 2


class ExpertActor:
    """Runs one replica, of one expert or of a pack, on the device that Ray assigned. It starts without versions.

    An expert that computes `hang_seconds` beyond the deadline of its call, takes so long beyond its time to be staged,
    or keeps every thread from running for so long, ends the process, and Ray starts another.
    """

    def __init__(
        self,
        replica_id: str,
        experts: tuple[str, ...],
        device: str,
        logs: LogSettings,
        channel: ChannelSettings | None,
        hang_seconds: float,
    ) -> None:
        configure_logs(replica_id, logs.level, logs.path)
        logging.raiseExceptions = False  # an expert may have closed standard error
        torch.set_num_threads(1)
        self._host = ExpertHost(device)
        self._orders = Orders()
        self._refused = Refused()
        self._senders: set[str] = set()
        self._id = replica_id
        self._experts = experts
        here = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._channel = None
        if channel is not None:
            self._channel = open_channel(self._host, replica_id, channel, here, address, _end_process)
        self._hang_seconds = hang_seconds
        threading.Thread(target=self._watch, name="expertmesh-watch", daemon=True).start()
        settle()

    def _watch(self) -> None:
        while True:
            # A thread of C ends the process where this thread cannot: an expert may hold Python's lock for ever.
            faulthandler.dump_traceback_later(self._hang_seconds + WATCH_SECONDS, exit=True, file=STDERR)
            if (overdue := self._host.overdue(self._hang_seconds)) is not None:
                _end_process(str(overdue))
            time.sleep(WATCH_SECONDS)

    @ray.method(concurrency_group="compute")
    def compute(self, call: ExpertCall, router: str) -> Any:
        """Compute one message sent as an actor call, with packed tensors; the reply is packed too.

        Raises Fenced for a router that the controller has given up.
        """
        self._senders.add(router)
        reply = None if router in self._refused else self._host.compute(unpacked_call(call))
        if reply is None or router in self._refused:
            raise Fenced("the controller has given this router up")
        return packed_reply(reply)

    @ray.method(concurrency_group="stage")
    def stage(
        self, order: Order, proposal: Proposal, replaces: str | None, mode: str, weights: Mapping[str, Packed] | None
    ) -> Receipt:
        """Build and verify a version beside the serving ones, at low priority. Raises Fenced."""
        self._orders.check(order)
        yield_to_serving()
        if weights is not None:
            proposal = replace(proposal, weights={name: from_bytes(*packed) for name, packed in weights.items()})
        try:
            receipt = self._host.stage(proposal, replaces, mode)
            self._orders.staged(receipt.id, receipt.version, order)
            return receipt
        finally:
            trim_memory()

    @ray.method(concurrency_group="control")
    def unload(self, order: Order, expert_id: str, version: str) -> None:
        """Unload a version, unless it was staged again since. Raises Fenced."""
        self._orders.check(order)
        if self._orders.may_unload(expert_id, version, order):
            self._host.unload(expert_id, version)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Close the channel, so that no socket of this process stays when it is killed."""
        if self._channel is not None:
            self._channel.close()

    @ray.method(concurrency_group="control")
    def report(self, order: Order | None = None, given_up: Mapping[str, str] | None = None) -> Replica:
        """This replica's experts, node, device, address and loaded versions; raises Fenced where a controller asks.

        When this returns, nothing more is answered to the routers that are `given_up`, as `ChannelServer.refuse` says.
        """
        if order is not None:
            self._orders.check(order)
        if given_up:
            self._refused.add(given_up, list(self._senders))
            if self._channel is not None:
                self._channel.refuse(given_up)
        channel = self._channel
        addresses = {} if channel is None else {"address": channel.address, "tcp_address": channel.tcp_address}
        device = _device_name(self._host.device)
        cure = f"its process is ended {self._hang_seconds:g} s beyond the deadline"
        where = {"experts": self._experts, "node": node(), "device": device, **addresses}
        return report_of(self._id, self._host, cure, **where)


class RouterActor:
    """Runs the router's process: gateway, router, metrics.

    What is wrong with its settings is raised by every call: for an error in the constructor Ray would only report that
    the actor died.
    """

    def __init__(
        self, settings: ServiceSettings, logs: LogSettings, channel: ChannelSettings | None, owners_node: str
    ) -> None:
        configure_logs(settings.router, logs.level, logs.path)
        torch.set_num_threads(1)
        take_turns_often()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        away = ray.get_runtime_context().get_node_id() != owners_node
        if away:
            settings = away_from_owner(settings, address)
        self._settings, self._address = settings, address if away else None
        self._actors = Actors(channel, node())
        self._trimmed = 0.0
        self._control = RayControlPort()
        self._opened: ListeningService | ExpertMeshError
        try:
            self._opened = ListeningService(settings, self._actors.transport, self._control)
        except ExpertMeshError as error:
            self._opened = error
        self._place: Place | None = None

    @property
    def _service(self) -> ListeningService:
        if isinstance(self._opened, ExpertMeshError):
            raise self._opened
        return self._opened

    async def start(self) -> Place:
        """Start to listen; idempotent. Returns where."""
        if self._place is None:
            self._place = place_of(self._settings, *await self._service.start(), self._address)
            self._service.where = {**self._place.described(), "node": node()}
            settle()
        return self._place

    async def declare(self, controller: Any, desired: Desired) -> None:
        """Take newer declared layers, and the handles of replicas and controller."""
        self._actors.declared(desired.handles)
        self._control.handle = controller
        await self._service.declare(desired)

    async def sync(self, order: Order, update: RouterUpdate) -> RouterReport:
        """Take an update from the controller; a router that Ray restarted starts to listen here."""
        await self.start()
        report = await self._service.sync(order, update)
        now = asyncio.get_running_loop().time()
        if now - self._trimmed > TRIM_SECONDS:  # uploads and large requests leave freed blocks
            self._trimmed = now
            trim_memory()
        return report

    async def stage(self, order: Order, candidate: Candidate) -> Receipt:
        """Stage and verify a gate."""
        return await self._service.stage(order, candidate)

    async def unload(self, order: Order, id: str, version: str) -> None:
        """Unload a gate."""
        await self._service.unload(order, id, version)

    async def stop(self, grace: float) -> None:
        """Drain and close the port."""
        await self._service.stop(grace)


class ControllerActor:
    """Runs the controller and its loop. A new incarnation takes over the registry from the previous one.

    While the state folder is refused, every call raises that error, and from time to time tries again: for an error in
    the constructor Ray would only report that the actor died.
    """

    def __init__(self, settings: StateSettings, logs: LogSettings, welcome: Welcome) -> None:
        configure_logs("controller", logs.level, logs.path)
        give_memory_back()
        self._router = RayRouterPort()
        self._welcome = welcome
        self._attached = AttachedRouters(self._members, settings.state_dir)
        self._opening = Opening(
            partial(open_controller, settings, AllRouters(self._router), RayReplicaPort()), time.monotonic
        )
        self._one_opens = asyncio.Lock()
        self._desk = OwnerDesk()
        with suppress(ExpertMeshError):  # whoever calls is told
            self._opening.get()
        self._turns: asyncio.Task[None] | None = None
        settle()

    async def _controller(self) -> Controller:
        if self._opening.opened is not None:
            return self._opening.opened
        async with self._one_opens:
            return await asyncio.to_thread(self._opening.get)

    async def _members(self) -> Routers:
        return (await self._controller()).routers

    async def declare(self, controller: Any, desired: Desired, timeout: float) -> dict[str, str]:
        """Load the layers that the owner declares; returns the versions that then serve.

        The handles come with every call, not with the constructor, whose arguments Ray may lose before a restart.
        """
        self._router.controller = controller
        opened = await self._controller()
        await self._attached.restore()
        if self._turns is None:
            self._turns = asyncio.get_running_loop().create_task(opened.run())
        return await opened.declare(desired, timeout)

    async def swap(self, request: SwapRequest) -> SwapResult:
        """Carry out a swap."""
        try:
            return await (await self._controller()).swap(request)
        finally:  # later, because a refusal is not sent yet
            asyncio.get_running_loop().call_later(LET_GO_SECONDS, let_go)

    async def change(self, request: ScaleRequest | LayersRequest) -> dict[str, Any]:
        """Have the owner change numbers of replicas, or layers."""
        return await self._desk.ask(request)

    async def changes(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        """Take the owner's answers, and hand out what is asked of it."""
        return await self._desk.fetch(answers)

    async def progress(self, swap_id: str) -> dict[str, Any]:
        """The progress of a swap."""
        return (await self._controller()).progress(swap_id)

    async def history(self, id: str) -> list[dict[str, Any]]:
        """The kept versions of an id."""
        return (await self._controller()).history(id)

    async def declared(self) -> dict[str, Any]:
        """The document of what is declared."""
        return await (await self._controller()).declared()

    async def recall(self, epoch: int, ttl: float) -> None:
        """Load a kept epoch."""
        await (await self._controller()).recall(epoch, ttl)

    def welcome(self) -> Welcome:
        """What a router in another process needs to attach."""
        return self._welcome

    async def attach(self, name: str, fresh: bool) -> str:
        """Take a router of another process as a member; returns the id of its mailbox."""
        return await self._attached.join(name, fresh)

    async def fetch(
        self, name: str, box_id: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        """Take the answers of an attached router, and wait for orders to it."""
        return await self._attached.fetch(name, box_id, answers, held, seconds)

    async def detach(self, name: str) -> None:
        """Let an attached router go."""
        await self._attached.leave(name)

    async def problem(self) -> str:
        """Why the controller does not work; empty if it does."""
        opened = self._opening.opened
        return self._opening.problem if opened is None else opened.problem

    async def state(self) -> ControllerState:
        """The state of the controller."""
        return (await self._controller()).state()


def _end_process(reason: str) -> None:
    """End the process of a replica that cannot serve any more: Ray starts another."""
    log.critical("the replica's process is ended: %s", reason)
    os._exit(1)


def node() -> str:
    """This node's address, and the start of its Ray id."""
    return f"{ray.util.get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:8]}"  # type: ignore[no-untyped-call]


def _device_name(device: str) -> str:
    return f"cuda:{torch.cuda.get_device_name()}" if device == "cuda" else device
