"""Rows to experts: (row, expert) pairs sorted by expert, in a handle by which work is split and answers are combined.

Shapes: T rows, K choices a row, E experts, N pairs (at most T·K).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...experts.errors import InvalidRequest
from ..gates.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """The pairs of a batch, sorted by expert, then by row.

    `rows_N` int64: the source row of each pair. `weights_N` float: its gate weight.
    `offsets`: E + 1 integers; the pairs of expert e are offsets[e]:offsets[e + 1].
    `slots_TK` int64: the positions of each row's pairs in 0..N-1, ascending (so by ascending expert); -1 = none.
    `dropped_T` int64 or None: the choices of each row that capacity took away.
    `full` says that no slot is -1.
    """

    rows_N: Tensor
    weights_N: Tensor
    offsets: tuple[int, ...]
    slots_TK: Tensor
    dropped_T: Tensor | None = None
    full: bool = False

    @property
    def num_rows(self) -> int:
        return self.slots_TK.shape[0]

    @property
    def num_pairs(self) -> int:
        """N, over the whole batch, also in a slice."""
        return self.rows_N.shape[0]

    def pairs(self, expert: int) -> slice:
        """The positions of the pairs of `expert`."""
        return slice(self.offsets[expert], self.offsets[expert + 1])

    def slice(self, start: int, stop: int) -> Dispatch:
        """The handle of the rows start:stop of a merged batch: it reads its pairs of the same [N, ...] buffers."""
        dropped_T = None if self.dropped_T is None else self.dropped_T[start:stop]
        return replace(self, slots_TK=self.slots_TK[start:stop], dropped_T=dropped_T)

    def without(self, lost_TK: Tensor) -> Dispatch:
        """The handle without the slots that are True in `lost_TK` [T, K]."""
        return replace(self, slots_TK=self.slots_TK.masked_fill(lost_TK, -1), full=False)

    def experts(self) -> tuple[int, ...]:
        """The distinct experts that the rows of this handle (whole batch or slice) need, ascending."""
        if self.full and self.slots_TK.numel() == self.num_pairs:  # all of the batch
            return tuple(e for e, end in enumerate(self.offsets[1:]) if self.offsets[e] < end)
        slots = self.slots_TK[self.slots_TK >= 0]
        experts = torch.searchsorted(torch.tensor(self.offsets[1:], device=slots.device), slots, right=True)
        return tuple(torch.bincount(experts).nonzero().flatten().tolist())

    def mass(self) -> dict[int, float]:
        """The sum of |gate weight| of each expert that has pairs."""
        chosen = [e for e, end in enumerate(self.offsets[1:]) if self.offsets[e] < end]
        if not chosen:
            return {}
        weights_N = np.abs(self.weights_N.detach().cpu().numpy())
        masses = np.add.reduceat(weights_N, [self.offsets[e] for e in chosen], dtype=np.float64).tolist()
        return dict(zip(chosen, masses, strict=True))

    def expert_of(self, slot: int) -> int:
        """The expert of the pair at position `slot`."""
        return bisect_right(self.offsets, slot) - 1


def dispatch(routing: Routing, num_experts: int) -> Dispatch:
    """Group the choices of a routing by expert. Choices of index -1 make no pair.

    Cost is one stable sort of T·K small integers. Raises InvalidRequest for an index of `num_experts` or above.
    """
    indices_TK = routing.indices_TK
    sorted_N, order_N = indices_TK.flatten().sort(stable=True)
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=sorted_N.device)).tolist()
    none, total = bounds[0], bounds[-1]
    if total != sorted_N.shape[0]:
        raise InvalidRequest(f"a row chose expert {int(sorted_N[-1])}, but there are {num_experts} experts: 0 to that")
    rows_N = order_N.div(indices_TK.shape[1], rounding_mode="trunc")
    if none == 0:  # each row has K pairs, so a stable sort by row puts its pairs side by side, still by expert
        slots_TK = rows_N.sort(stable=True).indices.view_as(indices_TK)
    else:
        places_N = torch.arange(-none, total - none, device=order_N.device)
        slots_TK = torch.empty_like(order_N).scatter_(0, order_N, places_N).view_as(indices_TK)
        slots_TK = slots_TK.clamp(min=-1).sort(dim=1).values
        order_N, rows_N = order_N[none:], rows_N[none:]
    return Dispatch(
        rows_N=rows_N,
        weights_N=routing.weights_TK.flatten().index_select(0, order_N),
        offsets=tuple(bound - none for bound in bounds) if none else tuple(bounds),
        slots_TK=slots_TK,
        dropped_T=routing.dropped_T,
        full=none == 0,
    )
