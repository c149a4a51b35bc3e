"""Where a batch's buffer of answers holds sums of several answers already.

Index arithmetic on few rows is done by numpy, whose calls cost a third of torch's.
Shapes: T rows, K choices a row, N pairs of the batch, S terms: what is left to be added up, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...experts.sums.bag_sum import bag_sum
from .dispatch import Dispatch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Presummed:
    """Which pairs of a batch were added up where they were computed.

    The sum of a row and a replica stands in the place of the row's first pair there: `first_N` bool. The row's other
    pairs there are in it and have no place of their own: `absorbed_N` bool. What is left of each row are its terms:
    `slots_S` int64 are their places, those of row t at `starts[t]:starts[t + 1]`; `kept_TK` bool says which of its
    pairs these are, and `single` whether any of them is one answer, which wants its weight, and not a sum.
    """

    first_N: Array
    absorbed_N: Array
    kept_TK: Array
    slots_S: Array
    starts: Array
    single: bool

    @classmethod
    def of(cls, handle: Dispatch, absorbed: Sequence[Array | slice], places: Sequence[Array]) -> Presummed:
        """What became of a batch's pairs: `absorbed` went into sums, which stand at `places`."""
        first_N = np.zeros(handle.num_pairs, dtype=bool)
        absorbed_N = np.zeros(handle.num_pairs, dtype=bool)
        for pairs in absorbed:
            absorbed_N[pairs] = True
        for firsts in places:
            first_N[firsts] = True
        absorbed_N &= ~first_N
        slots_TK = handle.slots_TK.numpy()
        kept_TK = ~absorbed_N[slots_TK]
        if not handle.full:
            kept_TK &= slots_TK >= 0
        slots_S = slots_TK[kept_TK]
        starts = np.zeros(handle.num_rows + 1, dtype=np.int64)
        np.cumsum(kept_TK.sum(axis=1), out=starts[1:])
        return cls(first_N, absorbed_N, kept_TK, slots_S, starts, not first_N[slots_S].all())

    def slice(self, start: int, stop: int) -> Presummed:
        """The same for the rows start:stop of a merged batch."""
        if start == 0 and stop == self.kept_TK.shape[0]:
            return self
        first, last = self.starts[start], self.starts[stop]
        return replace(
            self,
            kept_TK=self.kept_TK[start:stop],
            slots_S=self.slots_S[first:last],
            starts=self.starts[start : stop + 1] - first,
        )

    def sum(self, outputs_N: Tensor, weights_TK: Tensor | None) -> Tensor:
        """The terms of each row, added up in ascending order of the expert: [T, ...], float32 or float64.

        `weights_TK` are the weights of single answers; None where `single` is False.
        """
        weights_S = None
        if weights_TK is not None:
            weights_S = weights_TK[torch.from_numpy(self.kept_TK)]
            weights_S = weights_S.masked_fill(torch.from_numpy(self.first_N[self.slots_S]), 1)
        slots_S, starts_T = torch.from_numpy(self.slots_S), torch.from_numpy(self.starts[:-1])
        return bag_sum(outputs_N, slots_S, starts_T, weights_S)

    def at(self, handle: Dispatch) -> tuple[Tensor, Tensor]:
        """`first_N` and `absorbed_N` by row: bool [T, K] each."""
        held_TK = handle.slots_TK >= 0
        slots_TK = handle.slots_TK.clamp(min=0)
        first_N, absorbed_N = torch.from_numpy(self.first_N), torch.from_numpy(self.absorbed_N)
        return first_N[slots_TK] & held_TK, absorbed_N[slots_TK] & held_TK
