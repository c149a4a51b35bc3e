"""Experts for experiments with faults: answers that are exact whatever the batch, stamped by their version.

Shapes: R rows at an expert, D width, E experts of the layer.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

LARGEST = 4


class ChaosExpert(nn.Module):
    """y = [x·Wᵀ, stamp]: rows [R, D] to rows [R, D + E], of whole numbers that fp32 holds exactly in any order of sums.

    `weight` [D, D] holds whole numbers up to `LARGEST`; `stamp` [E] is zero but in the expert's own place, where each
    version has a number of its own. Weights that are drawn here follow from `place`. `pause` is in seconds a message,
    and stands for work that takes time elsewhere, as on a GPU.
    """

    stamp: Tensor

    def __init__(self, width: int, experts: int, place: int, pause: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(place)
        weight = torch.randint(-LARGEST, LARGEST + 1, (width, width), generator=generator)
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.register_buffer("stamp", torch.zeros(experts))
        self.stamp[place] = 1.0
        self.pause = pause

    def forward(self, x_RD: Tensor) -> Tensor:
        """Compute rows."""
        if self.pause:
            time.sleep(self.pause)
        return torch.cat([x_RD @ self.weight.T, self.stamp.expand(x_RD.shape[0], -1)], dim=1)


class SlowExpert(nn.Module):
    """Gives its rows back after `seconds` for each of them, one after the other, as one busy device would."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Sleep, then pass the rows on."""
        time.sleep(self.seconds * x.shape[0])
        return x.clone()
