"""The product: its cluster in a process of its own, its router here where a peer's driver is, or behind its client.

The router that runs here is the one that the cluster runs, over the same channels to the same actors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertmesh import AsyncClient
from expertmesh.cluster.channel.router_end import ChannelTransport
from expertmesh.experts.package_version import version
from expertmesh.experts.protocol import CallOptions
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.fanout.replica_view import Replica
from expertmesh.router.request.answer import ForwardRequest
from expertmesh.router.request.forward import Router

from .arm import Arm
from .helper import Helper
from .model import Shape, names
from .product_host import LAYER, layer

SECONDS = 120.0


class Product(Arm):
    """A running cluster of one layer, and in `said` what it says of itself.

    It has `actors` for its experts, by default one for each. `stall` is the seconds that one expert of the last actor
    sleeps before it computes a message.
    """

    kind, transport = "layer", "channel"

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None, stall: float = 0.0) -> None:
        self.layer = (*names(shape, dtype), actors or shape.experts)
        self._helper = Helper(f"{__package__}.product_host", self.kind, *self.layer, self.transport, stall)
        self.said = self._helper.said
        what = f"{self.kind}, {self.layer[-1]} actors, rows by {self.transport}"
        self.version = f"expertmesh {version()}, torch {torch.__version__}, {what}"

    def close(self) -> None:
        self._helper.close()


class ProductRouter(Product):
    """A router here over the channels of a cluster's actors."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None, stall: float = 0.0) -> None:
        super().__init__(shape, dtype, actors=actors, stall=stall)
        self._replicas = [
            Replica(**{**told, "experts": tuple(told["experts"]), "holds": frozenset(map(tuple, told["holds"]))})
            for told in self.said["replicas"]
        ]
        self._router = Router(ChannelTransport(bytes.fromhex(self.said["secret"])), max_rows_in_flight=1 << 20)
        self._layer = layer(*self.layer, stall)

    async def call(self, x_TD: Tensor) -> Tensor:
        if not self._router.epochs.number:
            self._router.update_view(self._replicas)
            self._router.adopt(Epoch(1, self.said["versions"], {LAYER: self._layer}))
        return (await self._router.forward(ForwardRequest(x_TD, CallOptions(layer=LAYER), SECONDS))).output

    def close(self) -> None:
        self._router.transport.close()
        super().close()


class ProductClient(Product):
    """The product as its users see it: the client over gRPC, from another process than the router's."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None) -> None:
        super().__init__(shape, dtype, actors=actors)
        self._client = AsyncClient(self.said["endpoint"], timeout=SECONDS)

    async def call(self, x_TD: Tensor) -> Tensor:
        answer: Tensor = await self._client.forward(LAYER, x_TD)
        return answer


class Identity(ProductClient):
    """Rows back as they came, from the router's own process: what the client's path costs."""

    kind, transport, echoes = "identity", "local", True


class IdentityActor(Identity):
    """The same through an actor."""

    transport = "channel"


class OneExpert(ProductClient):
    """The first expert of a layer; `actors` are its one-thread replicas."""

    kind, expert = "ffn", 0
