"""Capacity: a limit on the rows that an expert takes from one request, and which rows it drops.

Shapes: T rows, K choices per row, N pairs of a row and an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from ..gates.routing import Routing

DROP = ("position", "probability")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Each expert takes at most C = max(minimum, ⌈factor · N / E⌉) rows of a request with N choices (T·K for top-k;
    Fedus et al. 2021, eq. 3, for K = 1; GShard, Lepikhin et al. 2020, §2.2).

    `drop="position"` keeps the first C rows of an expert, `"probability"` those of largest |weight| (ties: the
    earlier row). Raises ConfigError for invalid values.
    """

    factor: float
    drop: str = "position"
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.drop not in DROP or not 0 < self.factor < math.inf or self.minimum < 0:
            raise ConfigError(
                f"capacity needs a factor above 0, drop one of {', '.join(DROP)}, and a minimum of 0 or more; "
                f"got factor={self.factor}, drop={self.drop!r}, minimum={self.minimum}"
            )

    def rows(self, num_choices: int, num_experts: int) -> int:
        """The capacity C for a request with `num_choices` choices."""
        return max(self.minimum, math.ceil(self.factor * num_choices / num_experts))

    def apply(self, routing: Routing, num_experts: int) -> Routing:
        """Drop the choices above the capacity of their expert; the other weights stay unchanged.

        Apply it to the routing of a single request. `dropped_T` of the result counts these choices and those that the
        gate itself dropped.
        """
        chosen_TK = routing.indices_TK >= 0
        capacity = self.rows(int(chosen_TK.sum()), num_experts)
        keep_TK = within_capacity(routing, num_experts, capacity, by_weight=self.drop == "probability")
        dropped_T = (chosen_TK & ~keep_TK).sum(dim=1)
        if routing.dropped_T is not None:
            dropped_T = dropped_T + routing.dropped_T
        return Routing(
            routing.indices_TK.masked_fill(~keep_TK, -1), routing.weights_TK.masked_fill(~keep_TK, 0), dropped_T
        )


def within_capacity(routing: Routing, num_experts: int, capacity: int, *, by_weight: bool) -> Tensor:
    """Bool [T, K]: the choices among the first `capacity` of their expert, by row or by descending |weight|."""
    experts_N = routing.indices_TK.flatten()
    if by_weight:
        heavy_first = routing.weights_TK.detach().flatten().abs().sort(descending=True, stable=True).indices
        order = heavy_first[experts_N[heavy_first].sort(stable=True).indices]
    else:
        order = experts_N.sort(stable=True).indices
    counts = torch.bincount(experts_N + 1, minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    rank_N = torch.empty_like(experts_N)
    rank_N[order] = torch.arange(order.shape[0], device=order.device) - starts[experts_N[order] + 1]
    return ((rank_N < capacity) & (experts_N >= 0)).view_as(routing.indices_TK)
