"""Layers of one expert behind the product's client: one that gives its rows back, and one feed-forward network."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from expertmesh import AsyncClient
from expertmesh.experts.package_version import version

from .arm import Arm
from .helper import Helper
from .model import DTYPES, SHAPES, Shape
from .product_single_host import LAYER

SECONDS = 120.0


class _Single(Arm):
    """A client of a cluster with one expert, in a process of its own."""

    def __init__(self, kind: str, shape: Shape, dtype: torch.dtype, transport: str, replicas: int) -> None:
        names = [name for name, known in SHAPES.items() if known == shape]
        names += [name for name, known in DTYPES.items() if known == dtype]
        self._helper = Helper(f"{__package__}.product_single_host", kind, *names, transport, str(replicas))
        self._client = AsyncClient(json.loads(self._helper.said)["endpoint"], timeout=SECONDS)
        self.version = f"expertmesh {version()}, {kind}, rows by {transport}, {replicas} replicas"

    async def call(self, x_TD: Tensor) -> Tensor:
        answer: Tensor = await self._client.forward(LAYER, x_TD)
        return answer

    def close(self) -> None:
        self._helper.close()


class Identity(_Single):
    """Rows back as they came, from the router's own process or through an actor: what the client's path costs."""

    name = "identity"
    echoes = True

    def __init__(self, shape: Shape, dtype: torch.dtype, *, transport: str = "local") -> None:
        super().__init__("identity", shape, dtype, transport, 1)


class OneExpert(_Single):
    """The first expert of a layer, in two one-thread replicas: as many threads as this machine has cores."""

    name = "ffn"
    expert = 0

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__("ffn", shape, dtype, "channel", 2)
