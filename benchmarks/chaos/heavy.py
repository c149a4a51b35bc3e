"""A chaos expert with as many bytes of weights as a real one has: swaps cost what they cost, answers stay exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmesh.experts.chaos import ChaosExpert


class HeavyExpert(ChaosExpert):
    """`ballast` bytes of float32 beside what it computes with."""

    ballast: Tensor

    def __init__(self, *, ballast: int, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("ballast", torch.zeros(ballast // 4))
