"""The product: its cluster in a process of its own, its router here where a peer's driver is, or behind its client.

The router that runs here is the one that the cluster runs, over the same channels to the same actors.
"""

from __future__ import annotations

import json
from typing import Any

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
from .model import DTYPES, SHAPES, Shape
from .product_host import LAYER, layer

SECONDS = 120.0


class _Served:
    """A running cluster, and what it says of itself."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, actors: int | None, transport: str, stall: float = 0.0
    ) -> None:
        self.shape = next(name for name, known in SHAPES.items() if known == shape)
        self.dtype = next(name for name, known in DTYPES.items() if known == dtype)
        self.actors = actors or shape.experts
        arguments = (self.shape, self.dtype, str(self.actors), transport, str(stall))
        self._helper = Helper(f"{__package__}.product_host", *arguments)
        self.said: dict[str, Any] = json.loads(self._helper.said)
        self.version = f"expertmesh {version()}, torch {torch.__version__}, {self.actors} actors"

    def close(self) -> None:
        self._helper.close()


class ProductRouter(Arm):
    """A router here over the channels of a cluster's actors; by default each expert has one of its own.

    `stall` is the seconds that one expert of the last actor sleeps before it computes a message.
    """

    name = "expertmesh"

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None, stall: float = 0.0) -> None:
        self._served = served = _Served(shape, dtype, actors, "channel", stall)
        self.version = served.version
        self.replicas = [
            Replica(
                id=said["id"],
                experts=tuple(said["experts"]),
                incarnation=said["incarnation"],
                holds=frozenset((expert, version) for expert, version in said["holds"]),
                state=said["state"],
                pid=said["pid"],
                address=said["address"],
            )
            for said in served.said["replicas"]
        ]
        self.router = Router(ChannelTransport(bytes.fromhex(served.said["secret"])), max_rows_in_flight=1 << 20)
        self._layer = layer(served.shape, served.dtype, served.actors, stall)

    async def call(self, x_TD: Tensor) -> Tensor:
        if not self.router.epochs.number:
            self.router.update_view(self.replicas)
            self.router.adopt(Epoch(1, self._served.said["versions"], {LAYER: self._layer}))
        return (await self.router.forward(ForwardRequest(x_TD, CallOptions(layer=LAYER), SECONDS))).output

    def close(self) -> None:
        self.router.transport.close()
        self._served.close()


class ProductClient(Arm):
    """The product as its users see it: the client over gRPC, from another process than the router's."""

    name = "expertmesh_client"

    def __init__(
        self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None, transport: str = "channel"
    ) -> None:
        self._served = _Served(shape, dtype, actors, transport)
        self.version = f"{self._served.version}, rows by {transport}"
        self._client = AsyncClient(self._served.said["endpoint"], timeout=SECONDS)

    async def call(self, x_TD: Tensor) -> Tensor:
        answer: Tensor = await self._client.forward(LAYER, x_TD)
        return answer

    def close(self) -> None:
        self._served.close()
