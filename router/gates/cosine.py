"""Cosine scores: experts and rows compared by angle on a small sphere.

Shapes: T rows, D features, P projected features, E experts, K choices a row.
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

    `projection_weight` [P, D] and `projection_bias` [P], `expert_embedding` [E, P], and `log_scale` [1] = log 1/τ,
    held at log 100 at most. `softmax` and `renormalize` as in `TopK`.
    """

    name = "cosine"
    _MOST = math.log(100.0)

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
            raise ConfigError(f"projection is {projection}, temperature {temperature}: both must be above 0")
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
        scores_TE = scores_TE * self.log_scale.clamp(max=self._MOST).exp()
        return scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=self.renormalize)
