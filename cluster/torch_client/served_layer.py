"""A layer as its cluster serves it, as a module of torch: gate and experts are elsewhere, and nothing learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..client.client import Client
from ..client.reply import Reply


class ServedLayer(nn.Module):
    """Sends rows [..., D] to a layer of a cluster, and returns its answers [..., O]; `reply` is the last one's.

    It takes the place of the layer in a model that was trained in one process. Rows are cut into requests of `most`.

    Example:
        block.experts = ServedLayer(client, "block0")
    """

    def __init__(self, client: Client, layer: str, *, most: int = 4096, **options: Any) -> None:
        """`options` are those of `Client.call`."""
        super().__init__()
        self.layer = layer
        self.reply: Reply | None = None
        self._client = client
        self._most = most
        self._options = options

    def forward(self, x: Tensor) -> Tensor:
        """The answers of what serves. Raises the errors of a call."""
        rows = x.detach().reshape(-1, x.shape[-1])
        replies = [self._client.call(self.layer, part, **self._options) for part in torch.split(rows, self._most)]
        self.reply = replies[-1]
        y = torch.cat([torch.as_tensor(reply.output) for reply in replies])
        return y.reshape(*x.shape[:-1], y.shape[-1])
