"""A router that follows the controller, without Ray: its requests and changes come through a gateway.

The router has an event loop in a thread of its own; the gateway is on the loop of whoever uses it.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...experts.errors import ConfigError, ExpertMeshError, FailedPrecondition
from ...experts.identity.version_name import gate_digest, version_name
from ...experts.names import GATE, is_layer_id
from ...experts.spec import ANY
from ...experts.staging.stage import Receipt
from ...experts.weights.files import tensor_digest, tensors_of
from ...router.epochs.epochs import Epoch
from ...router.epochs.gate_staging import stage_gate
from ...router.epochs.pinning import RECALL_SECONDS
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import Transport
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ...router.request.forward import Router
from ..channel.refused import identity
from ..channel.settings import ChannelSettings
from ..config.layer_document import layer_digest
from ..control.messages import Candidate, Desired, RouterReport, RouterUpdate
from ..control.orders import Order, Orders
from ..control.ports import ControlPort
from ..gateway.authorise import TokenTable
from ..gateway.changes import ChangeMethods
from ..gateway.gateway import Gateway, GatewaySettings
from ..gateway.swaps import SwapMethods
from ..gateway.training import TrainMethods
from ..rpc.methods import Role
from ..state.training_sessions import TrainingSessions
from ..state.uploads import UploadLimits, Uploads
from ..state.version_folders import VersionStore
from .router_thread import RouterThread, elsewhere

UNMEASURED = "the gate is another one, takes rows of any width, or has no finite scores"
PROBLEM_SECONDS = 1.0
"""How long the status waits for a controller that is not heard to say why."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """The settings of a router's process: addresses, tokens and limits.

    The metrics page has the TLS of the gateway, unless `metrics_host` is loopback. The owner holds its port or not, as
    the gateway's. `tokens` are (sha256, role, expiry in seconds since 1970 or None). Uploads go to `state_dir`, which
    the controller shares; where that is None, none is taken. `allowed_factories` are those that an admin may name over
    the network. `router` is the name of this one among the routers of the cluster; one that is `attached` is in a
    caller's own process.
    """

    name: str
    router: str = "router-0"
    gateway: GatewaySettings
    metrics_port: int | None
    metrics_host: str = "127.0.0.1"
    tokens: tuple[tuple[str, Role, float | None], ...]
    max_rows_in_flight: int
    state_dir: str | None
    uploads: UploadLimits = field(default_factory=UploadLimits)
    allowed_factories: tuple[str, ...] = ()
    attached: bool = False


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """What a controller tells a process that attaches: the settings of routers, and those of the channel, if any."""

    settings: ServiceSettings
    channel: ChannelSettings | None

    @classmethod
    def of(cls, settings: ServiceSettings, channel: ChannelSettings | None) -> Welcome:
        """What may be told: neither tokens nor keys, and nothing of ports."""
        gateway = replace(settings.gateway, tls=None, port=0, port_held=False, socket=None)
        return cls(settings=replace(settings, tokens=(), metrics_port=None, gateway=gateway), channel=channel)


class RouterService:
    """Serves requests, and follows the controller. `where` says where it is, in the words of the status."""

    def __init__(self, settings: ServiceSettings, transport: Transport, control: ControlPort) -> None:
        self.where: Mapping[str, str] = {}
        self.router = Router(transport, max_rows_in_flight=settings.max_rows_in_flight)
        self._name = settings.router
        self.router.standing.required, self.router.standing.lost = True, self._identify
        self._identify()
        self._thread = RouterThread(self.router)
        self._settings = settings
        self.control = control
        self._tokens = TokenTable()
        for digest, role, expires in settings.tokens:
            self._tokens.add(digest, role, expires)
        state_dir = settings.state_dir
        uploads = None if state_dir is None else Uploads(VersionStore(state_dir), settings.uploads)
        self.swaps = SwapMethods(
            control,
            uploads,
            self.router.epochs,
            self.router.leases,
            self._thread.call,
            settings.allowed_factories,
            busy=lambda: self.router.admission.rows > 0,
        )
        drop, allowed = self.swaps.drop_uploads, settings.allowed_factories
        handlers = {**self.swaps.handlers(), **ChangeMethods(control, uploads, drop, allowed).handlers()}
        sessions = None if state_dir is None else TrainingSessions(state_dir)
        train = TrainMethods(self.router, sessions, self._tokens.knows, attached=settings.attached).answer
        run = self._thread.run
        self.gateway = Gateway(self.router, self._tokens, settings.gateway, self.status, handlers, run=run, train=train)
        self._revision = 0
        self._held: dict[tuple[str, str], Gate | Layer] = {}
        self._heard = 0.0
        self._broken: Mapping[str, str] = {}
        self._routers: Mapping[str, Mapping[str, Any]] = {}
        self._orders = Orders()

    @property
    def incarnation(self) -> str:
        """The session of the router: another one after each start, and whenever it was given up."""
        return self.router.standing.session

    def _identify(self) -> None:
        standing = self.router.standing
        given_up = partial(standing.lose, standing.session)
        self.router.transport.identify(identity(self._name, standing.session), given_up)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the router's thread."""
        return self._thread.loop

    def begin(self) -> None:
        """Begin to serve, on the running event loop: what the router asks of the controller is sent from there."""
        here = asyncio.get_running_loop()
        self.router.pinning.recall = lambda number: elsewhere(here, self.control.recall(number, RECALL_SECONDS))

    def close(self) -> None:
        """End the router's thread, not from there, and close everything; idempotent."""
        self._thread.close()
        self.swaps.close()

    async def declare(self, desired: Desired) -> None:
        """Know what was declared; what it is made of comes as versions."""
        await self._thread.call(self._declare, desired)

    def _declare(self, desired: Desired) -> None:
        self._revision = max(self._revision, desired.revision)

    async def stage(self, order: Order, candidate: Candidate) -> Receipt:
        """Stage and verify a gate, or a layer, beside the serving one. Raises as `stage_gate`, and Fenced."""
        self._orders.check(order)
        receipt, staged = await asyncio.to_thread(self._staged, candidate)
        self._orders.staged(receipt.id, receipt.version, order)
        await self._thread.call(self._held.__setitem__, (receipt.id, receipt.version), staged)
        return receipt

    def _staged(self, candidate: Candidate) -> tuple[Receipt, Gate | Layer]:
        if candidate.layer is not None:
            return self._receipt(candidate, layer_digest(candidate.layer), {}, None), candidate.layer
        old = self._held.get((candidate.id, candidate.replaces or ""))
        gate, drift = staged_gate(candidate, old if isinstance(old, Gate) else None)
        tensors = tensors_of(gate)
        return self._receipt(candidate, gate_digest(gate.name, gate, tensors), tensors, drift), gate

    def _receipt(
        self, candidate: Candidate, digest: str, tensors: Mapping[str, Tensor], drift: float | None
    ) -> Receipt:
        version, size = version_name(candidate.counter, digest), sum(tensor.nbytes for tensor in tensors.values())
        identity = (candidate.id, version, self.incarnation, digest, tensor_digest(tensors))
        return Receipt(*identity, drift=drift, nbytes=size, seconds=0.0, input=ANY, output=ANY, unmeasured=UNMEASURED)

    async def unload(self, order: Order, id: str, version: str) -> None:
        """Unload a gate or layer; loaded epochs keep theirs. Raises Fenced."""
        self._orders.check(order)
        if self._orders.may_unload(id, version, order):
            await self._thread.call(self._held.pop, (id, version), None)

    async def sync(self, order: Order, update: RouterUpdate) -> RouterReport:
        """Take a report of all replicas, and adopt the current epoch once its gates are loaded. Raises Fenced.

        Of an update that was overtaken by a later one nothing is taken.
        """
        self._orders.check(order)
        self._heard = time.monotonic()
        self.swaps.tidy()
        report = await self._thread.call(self._sync, order, update)
        self.gateway.notify()  # an epoch, or a replica, may have come or gone
        return report

    def _sync(self, order: Order, update: RouterUpdate) -> RouterReport:
        standing = self.router.standing
        standing.lose(update.given_up)
        if self._orders.is_newest_update(order):
            self._take(update)
            if self.router.epochs.number >= update.current:  # its gates may not be loaded here yet
                standing.confirmed(update.session)
        return RouterReport(
            incarnation=self.incarnation,
            revision=self._revision,
            epoch=self.router.epochs.number,
            oldest_pinned=self.router.epochs.oldest_pinned(),
            gates=frozenset(self._held),
            loads=self.router.fanout.loads(),
            busy=self.router.view.busy(),
            facts=self._facts(),
        )

    def _take(self, update: RouterUpdate) -> None:
        self._broken, self._routers = update.broken, update.routers
        self.router.telemetry.scaled = update.scaled
        self.router.leases.drop_expired()
        self.router.update_view(update.replicas)
        known = {epoch.number for epoch in self.router.epochs.known()}
        new = {n: versions for n, versions in update.epochs.items() if n not in known}
        built = {n: self._epoch(n, versions, update) for n, versions in new.items()}
        current = built.get(update.current)
        if current is not None:
            self.router.adopt(current)
        older = [epoch for n, epoch in built.items() if epoch is not None and n != update.current]
        kept = [epoch for epoch in self.router.epochs.known() if epoch.number in update.epochs]
        self.router.epochs.keep([*older, *kept])

    def _epoch(self, number: int, versions: Mapping[str, str], update: RouterUpdate) -> Epoch | None:
        """An epoch with its layers and gates, or None where one of them is not loaded yet, or does not fit.

        A layer that is broken, or whose gate is, stays out.
        """
        layers = {}
        for id in filter(is_layer_id, versions):
            name = id.partition("/")[0]
            gate_id = f"{name}/{GATE}"
            if number == update.current and {id, gate_id} & update.broken.keys():
                continue
            layer = self._held.get((id, versions[id]))
            gate = self._held.get((gate_id, versions.get(gate_id, "")))
            if not isinstance(layer, Layer) or not isinstance(gate, Gate):
                return None
            try:
                layers[name] = replace(layer, gate=gate)
            except ConfigError:
                return None
        return Epoch(number, versions, layers, update.cluster_id) if layers else None

    async def status(self) -> dict[str, Any]:
        """The status document of the cluster, as plain JSON types."""
        document: dict[str, Any] = await self._thread.call(self._status)
        if document["controller"]["state"] == "silent":
            document["controller"]["problem"] = await self._problem()
        return document

    async def _problem(self) -> str:
        """Why the controller is not heard, as far as it says so itself."""
        try:
            return await asyncio.wait_for(self.control.problem(), PROBLEM_SECONDS)
        except ExpertMeshError as error:
            return error.message
        except (asyncio.TimeoutError, TimeoutError):
            return "it does not answer"

    def _status(self) -> dict[str, Any]:
        telemetry, epochs = self.router.telemetry, self.router.epochs
        layers = epochs.current.layers if epochs.number else {}
        age = time.monotonic() - self._heard if self._heard else None
        return {
            "name": self._settings.name,
            "epoch": epochs.number,
            "draining": epochs.draining(),
            "broken": dict(self._broken),
            "not_declared": _not_declared(layers, epochs.current.versions if epochs.number else {}),
            "autoscale": {group: asdict(scaled) for group, scaled in telemetry.scaled.items()},
            "layers": {name: self._layer(layer) for name, layer in layers.items()},
            "router": {
                "name": self._settings.router,
                **self._facts(),
                "retries": telemetry.retries,
                "hedges": telemetry.hedges,
                "messages": dict(telemetry.messages),
                "batches": dict(telemetry.batches),
                "rows_carried": dict(self.router.transport.carried),
            },
            "routers": self._all_routers(),
            "controller": {"heard_seconds_ago": age, "state": "ok" if age is not None and age < 3.0 else "silent"},
        }

    def _facts(self) -> dict[str, Any]:
        """What the status says of this router, on whichever router it is asked for."""
        telemetry, epochs = self.router.telemetry, self.router.epochs
        return {
            **self.where,
            "pid": os.getpid(),
            "incarnation": self.incarnation,
            "epoch": epochs.number,
            "rows_in_flight": self.router.admission.rows,
            "requests": sum(telemetry.requests.values()),
            "failed_requests": sum(n for (_, code), n in telemetry.requests.items() if code != "OK"),
            "pins": {str(number): count for number, count in epochs.pins().items()},
            "leases": len(self.router.leases),
        }

    def _all_routers(self) -> dict[str, dict[str, Any]]:
        """Every router as the controller last told, and this one as it is now."""
        own = self._settings.router
        known = {name: dict(facts) for name, facts in self._routers.items()}
        known[own] = {"state": "starting", **known.get(own, {}), **self._facts()}
        return known

    def _layer(self, layer: Layer) -> dict[str, Any]:
        versions = self.router.epochs.current.versions
        telemetry, replicas = self.router.telemetry, self.router.view.replicas()
        experts = {}
        for expert_id, expert in layer.everyone_by_id.items():
            experts[expert_id] = {
                "version": versions[expert_id],
                "ephemeral": expert.ephemeral,
                "rows": telemetry.rows[expert_id],
                "errors": telemetry.errors[expert_id],
                "replicas": [_plain(replica) for replica in replicas if expert_id in replica.experts],
            }
        gate = {"id": layer.gate_id, "kind": layer.gate.name, "version": versions[layer.gate_id]}
        rows = {"shape": None if layer.input.shape is None else list(layer.input.shape), "dtype": layer.input.dtype}
        return {
            "gate": gate, "combine": layer.combine, "on_missing": layer.on_missing, "input": rows, "experts": experts
        }  # fmt: skip


def staged_gate(candidate: Candidate, old: Gate | None) -> tuple[Gate, float | None]:
    """A candidate's gate, ready to serve, and the drift of its scores if it differs from the old one only in tensors.

    Raises FailedPrecondition for an expert, and the errors of `stage_gate`.
    """
    if candidate.gate is None:
        raise FailedPrecondition(f"{candidate.id} is an expert: a router stages only gates")
    tensors = tensors_of(candidate.gate)
    if old is not None and tensors and repr(old) == repr(candidate.gate):
        return stage_gate(old, tensors, candidate.policy, name=candidate.id)
    return copy.deepcopy(candidate.gate).eval(), None


def _not_declared(layers: Mapping[str, Layer], versions: Mapping[str, str]) -> dict[str, str]:
    """The versions of ids that are in no layer any more: kept, and served by nobody."""
    declared = {id for layer in layers.values() for id in (*layer.own_ids, *layer.everyone_by_id)}
    return {id: version for id, version in sorted(versions.items()) if id not in declared}


def _plain(replica: Replica) -> dict[str, Any]:
    plain = asdict(replica)
    plain["holds"] = sorted(f"{expert} {version}" for expert, version in replica.holds)
    return plain
