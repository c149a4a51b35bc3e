"""Where a batch's buffer of answers holds sums of several answers already.

Shapes: T rows, K choices a row, N pairs of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .dispatch import Dispatch


@dataclass(frozen=True, eq=False)
class Presummed:
    """Which pairs of a batch were added up where they were computed.

    The sum of a row and a replica stands in the place of the row's first pair there: `first_N` bool. The row's other
    pairs there are in it and have no place of their own: `absorbed_N` bool.
    """

    first_N: Tensor
    absorbed_N: Tensor

    def terms(self, handle: Dispatch, weights_TK: Tensor) -> tuple[Dispatch, Tensor]:
        """The handle without absorbed pairs, and the weights with 1 where a sum stands."""
        first_TK, absorbed_TK = self.at(handle)
        return handle.without(absorbed_TK), weights_TK.masked_fill(first_TK, 1)

    def at(self, handle: Dispatch) -> tuple[Tensor, Tensor]:
        """`first_N` and `absorbed_N` by row: bool [T, K] each."""
        held_TK = handle.slots_TK >= 0
        slots_TK = handle.slots_TK.clamp(min=0)
        return self.first_N[slots_TK] & held_TK, self.absorbed_N[slots_TK] & held_TK
