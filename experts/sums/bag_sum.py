"""Weighted sums of bags of rows in a fixed order, so that the same batch gives the same bits.

Shapes: N rows, S slots, B bags; rows may have any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bag_sum(rows_N: Tensor, slots_S: Tensor, starts_B: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Σ weight · row over each bag, [B, ...], in the order of the slots.

    A slot is the index of a row. Bag b holds the slots from `starts_B[b]` up to the next start; with `starts_B` None
    the slots are [B, S / B], one bag per line. Accumulates in float32 (float64 for float64 rows). `weights` has the
    shape of the slots; None means 1.
    """
    dtype = torch.float64 if rows_N.dtype == torch.float64 else torch.float32
    shape = (slots_S.shape[0] if starts_B is None else starts_B.shape[0], *rows_N.shape[1:])
    flat_ND = rows_N.flatten(1) if rows_N.dim() > 1 else rows_N[:, None]
    if slots_S.numel() == 0 or flat_ND.shape[1] == 0:
        return torch.zeros(shape, dtype=dtype, device=rows_N.device)
    weights = None if weights is None else weights.to(dtype)
    sums = F.embedding_bag(slots_S, flat_ND.to(dtype), starts_B, mode="sum", per_sample_weights=weights)
    return sums.view(shape)
