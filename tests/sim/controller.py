"""The controller's process: the real `Controller`, `Executor` and `SwapTransactions` on a simulated network and disk.

They are put together here, and watched: each step that they reach may be the one at which the process is killed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sim.disk import Store
from sim.loop import Killed, Loop
from sim.network import Process, Reply
from sim.ports import Line, ReplicaPort, RouterPort
from sim.replica import digits

from expertmesh.cluster.control.candidates import CandidateBuilder
from expertmesh.cluster.control.controller import Controller
from expertmesh.cluster.control.events import Action, CommitSwap
from expertmesh.cluster.control.executor import Executor
from expertmesh.cluster.control.messages import Candidate, Change, Desired, SwapRequest
from expertmesh.cluster.control.routers.follow import Routers
from expertmesh.cluster.control.swap_transactions import SwapTransactions
from expertmesh.cluster.state.records import VersionRecord
from expertmesh.experts.errors import ExpertMeshError
from expertmesh.experts.staging.stage import Receipt
from expertmesh.router.mixture.layer import Layer

if TYPE_CHECKING:
    from sim.world import World

RETAIN_EPOCHS = 1


class ControllerProcess(Process):
    """A controller of its own, which takes the registry over from the one before it."""

    doubled = False

    def __init__(self, world: World, incarnation: str) -> None:
        super().__init__("controller", incarnation)
        self.world = world
        self.loop = Loop(world.clock, self, world.checker.bug)
        registry, store = world.rules.registry(world, self), Store(world, self)
        self.term = registry.term
        builder = Builder(registry, store)  # type: ignore[arg-type]
        transactions = world.rules.transactions(
            registry,
            store,  # type: ignore[arg-type]
            builder,
            retain_epochs=RETAIN_EPOCHS,
            clock=lambda: world.clock.now,
        )
        registry.opened()
        transactions.process = self
        line = Line(self)
        self.controller = Controller(transactions, RouterPort(self, line), ReplicaPort(line))
        self.controller.executor.__class__ = world.rules.executor
        self.controller.routers.leases = world.rules.leases(world.lease)
        self.controller.routers.leave = self._leave  # type: ignore[method-assign]
        self.controller.reconciler.__class__ = world.rules.reconciler
        self.controller._health.__class__ = world.rules.health
        self.controller.reconciler.swaps = world.rules.swaps()
        self._turning = False

    async def _leave(self) -> None:
        """As in truth; whoever is given up by it may not answer any more."""
        leases = self.controller.routers.leases
        before = leases.gone
        await Routers.leave(self.controller.routers)
        for _ in leases.gone - before:
            self.world.checker.counts["routers given up"] += 1

    def reach(self, step: str, when: str) -> None:
        """Come to a step of a swap, and perhaps not any further."""
        if self.alive:
            self.world.faults.reached(step, when, self)
        if not self.alive:
            raise Killed

    def on_declare(self, reply: Reply, desired: Desired, timeout: float) -> None:
        """As the controller's actor does it."""
        if not self._turning:
            self._turning = True
            self.loop.create_task(self.controller.run())
        self._answer(reply, self.controller.declare(desired, timeout))

    def on_state(self, reply: Reply) -> None:
        """Tell what is known."""
        reply(self.controller.state())

    def on_swap(self, reply: Reply, deadline: float, request: SwapRequest) -> None:
        """Carry out a swap, unless whoever asks for it has given up by now."""
        if self.world.clock.now < deadline:
            self._answer(reply, self.controller.swap(request))

    def on_recall(self, reply: Reply, number: int, ttl: float) -> None:
        """Load an old epoch."""

        async def recalled() -> str:
            await self.controller.recall(number, ttl)
            return "recalled"

        self._answer(reply, recalled())

    def _answer(self, reply: Reply, work: Awaitable[Any]) -> None:
        async def answered() -> None:
            try:
                result = await work
            except ExpertMeshError as error:
                result = error
            reply(result)

        self.loop.create_task(answered())


class Transactions(SwapTransactions):
    """The real ones, watched."""

    process: ControllerProcess

    def declared_swap(self, *asked: Any) -> SwapRequest | None:
        """With an id that the world has drawn: a random one would be in messages, and no seed would replay."""
        request = super().declared_swap(*asked)
        return None if request is None else replace(request, swap_id=self.process.world.clients.declared_id())

    def prepare(self, request: SwapRequest) -> None:
        self.process.reach("prepare", "before")
        super().prepare(request)
        self.process.reach("prepare", "after")

    def keep_receipt(self, swap_id: str, receipt: Receipt) -> None:
        self.process.reach("receipt", "before")
        super().keep_receipt(swap_id, receipt)
        self.process.reach("receipt", "after")

    def write(self, swap_id: str, versions: Mapping[str, str]) -> None:
        self.process.reach("write", "before")
        super().write(swap_id, versions)
        self.process.reach("write", "after")

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        self.process.reach("commit", "before")
        committed = super().commit(swap_id, versions)
        self.process.reach("commit", "after")
        return committed

    def answer(self, swap_id: str, epoch: int | None, error: ExpertMeshError | None) -> None:
        self.process.reach("answer", "before")
        super().answer(swap_id, epoch, error)
        self.process.reach("answer", "after")


class Watched(Executor):
    """The real one; what is about to be committed is looked at when it is decided."""

    async def perform(self, actions: Iterable[Action]) -> None:
        actions = list(actions)
        process = self.transactions.process  # type: ignore[attr-defined]
        for action in actions:
            if isinstance(action, CommitSwap):
                process.world.checker.receipts(process, action.swap_id, action.versions)
        await super().perform(actions)


class Builder(CandidateBuilder):
    """The real one, without files: uploads are not looked into, and gates are neither written nor read."""

    def declare(self, layers: Mapping[str, Layer], owner: str = "", resumed: Collection[str] = frozenset()) -> None:
        super().declare(layers, owner, resumed)
        gates = {layer.gate_id: NoFile(len(layer.experts)) for layer in layers.values()}
        self.declared |= {id: replace(self.declared[id], gate=gate) for id, gate in gates.items()}  # type: ignore[arg-type]

    def of_record(self, record: VersionRecord) -> Candidate:
        declared = self.declared[record.id]
        if declared.gate is None:
            return super().of_record(record)
        self._store.weights(record.id, record.version)
        return replace(declared, version=record.version, counter=record.counter)

    def _with_upload(self, id: str, base: Candidate, change: Change) -> Candidate:
        uploaded = replace(base, version=None, uploaded=True, note="upload")
        return replace(uploaded, tensor_digest=digits(change.upload or ""))


class NoFile:
    """A gate as far as the controller is concerned."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def save(self, path: object) -> None:
        """Nothing is written."""
