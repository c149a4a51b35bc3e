"""The product: its cluster in a process of its own, called through a router here, as a peer's driver, or a client."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from expertmesh import AsyncClient, attach
from expertmesh.experts.package_version import version

from .arm import Arm
from .helper import Helper
from .model import Shape, names
from .private_ray import private_ray
from .product_host import LAYER

SECONDS = 120.0


class Product(Arm):
    """A running cluster of one layer, and in `said` what it says of itself.

    It has `actors` for its experts, by default one for each. `stall` is the seconds that one expert of the last actor
    sleeps before it computes a message. It joins the Ray at `address`, or has a private one.
    """

    kind, transport = "layer", "channel"

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        *,
        actors: int | None = None,
        stall: float = 0.0,
        address: str = "",
    ) -> None:
        layer = (*names(shape, dtype), actors or shape.experts)
        self._helper = Helper(f"{__package__}.product_host", self.kind, *layer, self.transport, stall, address)
        self.said = self._helper.said
        what = f"{self.kind}, {layer[-1]} actors, rows by {self.transport}"
        self.version = f"expertmesh {version()}, torch {torch.__version__}, {what}"

    def close(self) -> None:
        self._helper.close()


class ProductRouter(Product):
    """The product from a process of its Ray: `attach` gives it a router of its own, to the same actors."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None, stall: float = 0.0) -> None:
        with ExitStack() as stack:
            ray = stack.enter_context(private_ray())  # a process can be in one Ray alone, and other arms are in this
            address = ray.get_runtime_context().gcs_address
            super().__init__(shape, dtype, actors=actors, stall=stall, address=address)
            stack.callback(super().close)
            self._router = stack.enter_context(attach(self.said["name"], timeout=SECONDS))
            self.version += ", attached"
            self._stack = stack.pop_all()

    async def call(self, x_TD: Tensor) -> Tensor:
        answer: Tensor = await self._router.aio.forward(LAYER, x_TD)
        return answer

    def close(self) -> None:
        self._stack.close()


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
