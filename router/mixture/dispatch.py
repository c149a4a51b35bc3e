"""Dispatch: (row, expert) pairs sorted by expert, in a handle that serves to split work and to combine answers.

Shapes: T rows, K choices per row, E experts, N pairs (at most T·K).
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
    `slots_TK` int64: the positions of each row's pairs in 0..N-1, ascending (hence in expert order); -1 = no pair.
    `dropped_T` int64 or None: the number of choices that each row lost to capacity.
    `full`: no slot is -1.
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
        """N of the whole batch, also in a slice."""
        return self.rows_N.shape[0]

    def pairs(self, expert: int) -> slice:
        """The positions of the pairs of `expert`."""
        return slice(self.offsets[expert], self.offsets[expert + 1])

    def slice(self, start: int, stop: int) -> Dispatch:
        """The handle of the rows start:stop of a merged batch; its slots index the same [N, ...] buffers."""
        dropped_T = None if self.dropped_T is None else self.dropped_T[start:stop]
        return replace(self, slots_TK=self.slots_TK[start:stop], dropped_T=dropped_T)

    def without(self, lost_TK: Tensor) -> Dispatch:
        """The handle without the slots that are True in `lost_TK` [T, K]."""
        return replace(self, slots_TK=self.slots_TK.masked_fill(lost_TK, -1), full=False)

    def experts(self) -> tuple[int, ...]:
        """The distinct experts that the rows of this handle (whole batch or slice) need, ascending."""
        if self.full and self.slots_TK.numel() == self.num_pairs:  # the whole batch
            return tuple(e for e, end in enumerate(self.offsets[1:]) if self.offsets[e] < end)
        slots = self.slots_TK[self.slots_TK >= 0]
        experts = torch.searchsorted(torch.tensor(self.offsets[1:], device=slots.device), slots, right=True)
        return tuple(torch.bincount(experts).nonzero().flatten().tolist())

    def mass(self) -> dict[int, float]:
        """The sum of |gate weight| over the pairs of each expert that has any."""
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
    """Group the choices of a routing by expert. Choices with index -1 make no pair.

    The cost is two sorts of T·K integers. Raises InvalidRequest for an index of `num_experts` or above.
    """
    indices_TK = routing.indices_TK
    sorted_N, order_N = indices_TK.flatten().sort(stable=True)
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=sorted_N.device)).tolist()
    empty, total = bounds[0], bounds[-1]
    if total != sorted_N.shape[0]:
        raise InvalidRequest(
            f"a row chose expert {int(sorted_N[-1])}, but expert indices go from 0 to {num_experts - 1}"
        )
    rows_N = order_N.div(indices_TK.shape[1], rounding_mode="trunc")
    if empty == 0:  # each row has K pairs: a stable sort by row puts them side by side, in expert order
        slots_TK = rows_N.sort(stable=True).indices.view_as(indices_TK)
    else:
        positions_N = torch.arange(-empty, total - empty, device=order_N.device)
        slots_TK = torch.empty_like(order_N).scatter_(0, order_N, positions_N).view_as(indices_TK)
        slots_TK = slots_TK.clamp(min=-1).sort(dim=1).values
        order_N, rows_N = order_N[empty:], rows_N[empty:]
    return Dispatch(
        rows_N=rows_N,
        weights_N=routing.weights_TK.flatten().index_select(0, order_N),
        offsets=tuple(bound - empty for bound in bounds) if empty else tuple(bounds),
        slots_TK=slots_TK,
        dropped_T=routing.dropped_T,
        full=empty == 0,
    )
