"""Cosine scores: the angle between a row, projected to a few dimensions, and the embedding of each expert.

Shapes: T rows, D features, P projected features, E experts, K choices per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...experts.errors import ConfigError
from .base import Gate
from .routing import Routing
from .softmax import check_softmax, softmax_top_k


class Cosine(Gate):
    """Top-k with softmax over h = cos(x·Pᵀ + b, e) / τ, with a learned temperature τ (Chi et al. 2022, X-MoE, §3;
    the cosine gate of Tutel).

    Parameters: `projection_weight` [P, D], `projection_bias` [P], `expert_embedding` [E, P], and `log_scale` [1] =
    log 1/τ, clamped to at most log 100. `softmax` and `renormalize` are those of `TopK`.

    >>> gate = gates.Cosine(in_features=16, num_experts=4, k=2, projection=8)
    >>> gate.select(torch.tensor([[0.0, 3.0, 1.0, 2.0]])).indices_TK
    tensor([[1, 3]])
    """

    name = "cosine"
    _MAX_LOG_SCALE = math.log(100.0)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        *,
        projection: int = 256,
        temperature: float = 0.5,
        softmax: str = "after",
        renormalize: bool = True,
    ) -> None:
        super().__init__(num_experts, in_features=in_features, k=k)
        check_softmax(softmax, renormalize)
        if projection < 1 or temperature <= 0:
            raise ConfigError(f"projection and temperature must be above 0, not {projection} and {temperature}")
        self.projection = projection
        self.temperature = temperature
        self.softmax = softmax
        self.renormalize = renormalize
        bound = 1 / math.sqrt(in_features)
        self.projection_weight = nn.Parameter(torch.empty(projection, in_features).uniform_(-bound, bound))
        self.projection_bias = nn.Parameter(torch.empty(projection).uniform_(-bound, bound))
        self.expert_embedding = nn.Parameter(torch.randn(num_experts, projection) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    def scores(self, x: Tensor) -> Tensor:
        x_TD = self._features(x, self.projection_weight.dtype)
        rows_TP = F.normalize(F.linear(x_TD, self.projection_weight, self.projection_bias), dim=1)
        scores_TE = F.linear(rows_TP, F.normalize(self.expert_embedding, dim=1))
        scores_TE = scores_TE * self.log_scale.clamp(max=self._MAX_LOG_SCALE).exp()
        return scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=self.renormalize)
