"""A router over hosts in this process, for the tests of whole requests: `async with RouterInProcess(layer) as mesh`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers.waiting import settle
from torch import Tensor

from expertmesh.cluster.placement.plan import plan_layer
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import CallOptions
from expertmesh.experts.spec import Expert
from expertmesh.experts.staging.stage import Proposal, Receipt
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.transport import LocalTransport, Transport
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request.answer import ForwardReply, ForwardRequest
from expertmesh.router.request.forward import Router

GATE_VERSION = "v1-000000000000"


def load(host: ExpertHost, expert_id: str, expert: Expert, counter: int = 1) -> Receipt:
    """Put an expert as it is declared into a host."""
    return host.stage(Proposal(id=expert_id, counter=counter, expert=expert))


class RouterInProcess:
    """One layer, one host for every replica of every expert, and a router that knows them all."""

    def __init__(self, layer: Layer, transport: Transport | None = None, **options: Any) -> None:
        self.layer = layer
        self.hosts: dict[str, ExpertHost] = {}
        self.local = LocalTransport()
        self.router = Router(transport or self.local, **options)
        self.versions = {layer.gate_id: GATE_VERSION}
        for planned in plan_layer(layer):
            host = self.hosts[planned.id] = ExpertHost()
            for expert_id, expert in planned.experts.items():
                self.versions[expert_id] = load(host, expert_id, expert).version
            self.local.add(planned.id, host)

    async def __aenter__(self) -> RouterInProcess:
        self.report()
        self.router.adopt(Epoch(1, self.versions, {self.layer.name: self.layer}))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.local.close()

    def replica(self, name: str, **changes: Any) -> Replica:
        host = self.hosts[name]
        known: Mapping[str, Any] = {
            "experts": tuple({expert for expert, _ in host.holds()}),
            "incarnation": host.incarnation,
            "holds": host.holds(),
            "state": READY,
        }
        return Replica(name, **{**known, **changes})

    def report(self, *others: Replica) -> None:
        given = {replica.id: replica for replica in others}
        self.router.update_view([given.get(name, self.replica(name)) for name in self.hosts])

    async def ask(
        self,
        x: Tensor,
        *,
        timeout: float = 60.0,
        features: Tensor | None = None,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
        **options: Any,
    ) -> ForwardReply:
        asked = CallOptions(layer=options.pop("layer", self.layer.name), **options)
        return await self.router.forward(ForwardRequest(x, asked, timeout, features, indices, weights))

    async def at_rest(self) -> None:
        """Check that nothing is pinned, admitted or under way once everything that can run has run."""
        await settle()
        router = self.router
        assert router.epochs.pins() == {}
        assert (router.admission.rows, router.admission.by_layer()) == (0, {})
        assert set(router.view.rows_in_flight().values()) <= {0}
