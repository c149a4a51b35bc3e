"""Noisy top-k: noise with a learned scale makes the gate explore during training.

Shapes: T rows, D features, E experts, K choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import LinearGate
from .routing import Routing
from .softmax import softmax_top_k


class NoisyTopK(LinearGate):
    """Softmax over the k best of H = x·W + N(0, 1) · softplus(x·W_noise) (Shazeer et al. 2017, eq. 3-5).

    Noise is added in training mode only, so serving is deterministic. `noise_weight` [E, D] starts at zero.
    `clean_scores` and `noise_scale` are the inputs of the paper's load loss (`balance.expected_load`).

    >>> gate = gates.NoisyTopK(in_features=16, num_experts=4, k=2).eval()
    >>> torch.equal(gate.scores(torch.ones(1, 16)), gate.clean_scores(torch.ones(1, 16)))
    True
    """

    name = "noisy_top_k"

    def __init__(self, in_features: int, num_experts: int, k: int = 2, *, bias: bool = False) -> None:
        super().__init__(in_features, num_experts, k=k, bias=bias)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, in_features))

    def clean_scores(self, x: Tensor) -> Tensor:
        """The scores x·W [T, E] without noise."""
        return super().scores(x)

    def noise_scale(self, x: Tensor) -> Tensor:
        """softplus(x·W_noise) [T, E]: the standard deviation of the noise on each score."""
        scale_TE = F.softplus(F.linear(self._features(x, self.noise_weight.dtype), self.noise_weight))
        return scale_TE if scale_TE.dtype == torch.float64 else scale_TE.float()

    def scores(self, x: Tensor) -> Tensor:
        scores_TE = self.clean_scores(x)
        return scores_TE + torch.randn_like(scores_TE) * self.noise_scale(x) if self.training else scores_TE

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=True)
