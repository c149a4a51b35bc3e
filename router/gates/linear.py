"""Scores from one matrix multiplication: the base class of most gates.

Shapes: T rows, D features, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Gate


class LinearGate(Gate):
    """Scores x·Wᵀ (+ b), with trainable `weight` [E, D] and, if `bias`, a trainable `bias` [E].

    >>> gates.Switch(in_features=16, num_experts=4).weight.shape
    torch.Size([4, 16])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, num_experts: int, *, k: int | None = None, bias: bool = False) -> None:
        super().__init__(num_experts, in_features=in_features, k=k)
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_experts, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def scores(self, x: Tensor) -> Tensor:
        scores_TE = F.linear(self._features(x, self.weight.dtype), self.weight, self.bias)
        return scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()

    def config(self) -> dict[str, Any]:
        return super().config() | {"bias": self.bias is not None}
