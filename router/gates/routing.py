"""What a gate decides: the experts of every row and their weights.

Shapes: T rows (tokens), K choices a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """The choice of a gate for T rows.

    `indices_TK` is int64: the expert of each choice, best first; -1 where a row has fewer than K choices.
    `weights_TK` is float32 (float64 where the scores are): the weight of each choice, 0 where the index is -1.
    `dropped_T` is int64, or None where nothing can be dropped: how many choices of each row capacity took away.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    dropped_T: Tensor | None = None

    @property
    def unrouted_T(self) -> Tensor:
        """Bool [T]: the rows that no expert takes (only capacity and expert choice leave such rows)."""
        return (self.indices_TK < 0).all(dim=1)


def join(routings: Sequence[Routing]) -> Routing:
    """The routing of several requests as one batch, in order; narrower ones are padded with empty choices.

    Gates that are not `per_row`, and capacity, choose for each request alone: join what they chose.
    """
    widest = max(routing.indices_TK.shape[1] for routing in routings)

    def padded(part_TK: Tensor, value: int) -> Tensor:
        return F.pad(part_TK, (0, widest - part_TK.shape[1]), value=value)

    counted = [routing.dropped_T for routing in routings]
    return Routing(
        torch.cat([padded(routing.indices_TK, -1) for routing in routings]),
        torch.cat([padded(routing.weights_TK, 0) for routing in routings]),
        None
        if all(dropped_T is None for dropped_T in counted)
        else torch.cat(
            [
                routing.indices_TK.new_zeros(routing.indices_TK.shape[0]) if dropped_T is None else dropped_T
                for routing, dropped_T in zip(routings, counted, strict=True)
            ]
        ),
    )
