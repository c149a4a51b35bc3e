"""The weighted sum of answers in a fixed order: the same batch gives bit-identical results.

Shapes: T rows, K choices per row, N pairs of a row and an expert; rows may have any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experts.sums.bag_sum import bag_sum
from .dispatch import Dispatch

BLOCK_ROWS = 256


def ordered_sum(
    handle: Dispatch, outputs_N: Tensor, weights_TK: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Sum weight · answer over the slots of each row, one after the other in ascending expert order: [T, ...].

    Accumulates in float32 (float64 for float64 answers), which is also the default dtype of the result. Empty slots
    add nothing. Answers of other dtypes are widened `BLOCK_ROWS` rows at a time, so that they stay in the cache.
    """
    if outputs_N.dtype in (torch.float32, torch.float64) or handle.num_rows <= BLOCK_ROWS or torch.is_grad_enabled():
        total = _block_sum(handle, outputs_N, weights_TK)
        return total if out_dtype is None else total.to(out_dtype)
    shape = (handle.num_rows, *outputs_N.shape[1:])
    total = torch.empty(shape, dtype=out_dtype or torch.float32, device=outputs_N.device)
    for start in range(0, handle.num_rows, BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        total[start:stop] = _block_sum(handle.slice(start, stop), outputs_N, weights_TK[start:stop])
    return total


def _block_sum(handle: Dispatch, outputs_N: Tensor, weights_TK: Tensor) -> Tensor:
    slots, starts = handle.slots_TK, None
    if not handle.full:
        held_TK = slots >= 0
        slots, weights_TK = slots[held_TK], weights_TK[held_TK]
        starts = F.pad(held_TK.sum(dim=1).cumsum(0), (1, 0))[:-1]
    wide = outputs_N.dtype in (torch.float32, torch.float64)
    if not wide and slots.numel() < outputs_N.shape[0]:  # a slice of a batch: convert only its own rows
        outputs_N = outputs_N.index_select(0, slots.flatten())
        slots = torch.arange(slots.numel(), device=slots.device).view_as(slots)
    return bag_sum(outputs_N, slots, starts, weights_TK)
