"""The result of a gate: the experts of every row and their weights.

Shapes: T rows (tokens), K choices per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """The choices of a gate for T rows.

    `indices_TK` is int64: the expert of each choice, best first; -1 where a row has fewer than K choices.
    `weights_TK` is float32 (float64 if the scores are): the weight of each choice, 0 where the index is -1.
    `dropped_T` is int64, or None if nothing can be dropped: the number of choices that each row lost to capacity.

    >>> Routing(torch.tensor([[1, 3], [0, -1]]), torch.tensor([[0.7, 0.3], [1.0, 0.0]])).unrouted_T
    tensor([False, False])
    """

    indices_TK: Tensor
    weights_TK: Tensor
    dropped_T: Tensor | None = None

    @property
    def unrouted_T(self) -> Tensor:
        """Bool [T]: the rows without an expert (only capacity and expert choice produce them)."""
        return (self.indices_TK < 0).all(dim=1)

    def slice(self, start: int, stop: int) -> Routing:
        """The choices of the rows start:stop."""
        dropped_T = None if self.dropped_T is None else self.dropped_T[start:stop]
        return Routing(self.indices_TK[start:stop], self.weights_TK[start:stop], dropped_T)


def join(routings: Sequence[Routing]) -> Routing:
    """Concatenate the routings of several requests into one batch; narrower ones are padded with empty choices.

    Gates that are not `per_row`, and capacity, must see each request alone: join their results.
    """
    widest = max(routing.indices_TK.shape[1] for routing in routings)

    def padded(part_TK: Tensor, value: int) -> Tensor:
        return F.pad(part_TK, (0, widest - part_TK.shape[1]), value=value)

    drops = [routing.dropped_T for routing in routings]
    return Routing(
        torch.cat([padded(routing.indices_TK, -1) for routing in routings]),
        torch.cat([padded(routing.weights_TK, 0) for routing in routings]),
        None
        if all(dropped_T is None for dropped_T in drops)
        else torch.cat(
            [
                routing.indices_TK.new_zeros(routing.indices_TK.shape[0]) if dropped_T is None else dropped_T
                for routing, dropped_T in zip(routings, drops, strict=True)
            ]
        ),
    )
