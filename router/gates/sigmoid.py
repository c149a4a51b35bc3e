"""Sigmoid scores with a balancing bias and a limit on groups: the gate of DeepSeek-V3.

Shapes: T rows, E experts, K choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import LinearGate
from .routing import Routing
from .selection import check_groups, exact_sigmoid, limit_groups, masked, pick, top


class Sigmoid(LinearGate):
    """The k experts of largest s + b, weighted by s alone, with s = sigmoid(x·Wᵀ) (DeepSeek-V3, eq. 12-16).

    `expert_bias` [E] (float32; no gradient) affects the choice, never the weights: `balance.balanced_bias` updates it.
    With `groups` > 1 a row uses the `top_groups` groups with the largest sum of their two best s + b. Weights are
    divided by their sum if `renormalize`, then multiplied by `scale`. Scores are computed in at least float32.

    >>> gate = gates.Sigmoid(in_features=16, num_experts=4, k=2, scale=2.5)
    >>> gate.select(torch.tensor([[0.0, 3.0, 1.0, 2.0]])).weights_TK.sum()
    tensor(2.5000)
    """

    name = "sigmoid"
    expert_bias: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        *,
        renormalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, k=k, bias=bias)
        check_groups(num_experts, groups, top_groups)
        self.renormalize = renormalize
        self.scale = scale
        self.groups = groups
        self.top_groups = top_groups
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def scores(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(self._features(x, dtype), self.weight.to(dtype), bias)

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        sigmoid_TE = exact_sigmoid(scores_TE)
        choice_TE = masked(sigmoid_TE.detach() + self.expert_bias, mask_TE)
        if self.groups > 1:
            choice_TE = limit_groups(choice_TE, self.groups, self.top_groups, best=2)
        _, indices_TK = top(choice_TE, k)
        weights_TK = pick(sigmoid_TE, indices_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
        return Routing(indices_TK, weights_TK * self.scale)
