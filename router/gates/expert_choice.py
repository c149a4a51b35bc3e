"""Expert choice: the experts pick their rows, so each gets the same number of them.

Shapes: T rows, E experts, C rows of each expert, K choices per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from .linear import LinearGate
from .routing import Routing
from .selection import masked, members, pick, top


class ExpertChoice(LinearGate):
    """Each expert takes the C = ⌈T · capacity_factor / E⌉ rows of largest p, p = softmax(h) (Zhou et al. 2022, §3.2).

    `capacity_factor` is the mean number of experts per row. The choice for a row depends on the other rows of the
    request, which leaks future tokens: do not use it for autoregressive models. Rows that no expert picks count as
    dropped. Ties go to the earlier row.

    >>> gate = gates.ExpertChoice(in_features=16, num_experts=2, capacity_factor=1.0)
    >>> gate.select(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).indices_TK.tolist()  # two rows, one for each expert
    [[1], [0]]
    """

    name = "expert_choice"
    per_row = False
    k_per_request = False

    def __init__(self, in_features: int, num_experts: int, capacity_factor: float = 2.0, *, bias: bool = False) -> None:
        super().__init__(in_features, num_experts, bias=bias)
        if not 0 < capacity_factor <= num_experts:
            raise ConfigError(f"capacity_factor is {capacity_factor}, but must be above 0 and at most {num_experts}")
        self.capacity_factor = capacity_factor

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        num_rows = scores_TE.shape[0]
        if num_rows == 0:
            return Routing(scores_TE.new_empty((0, 1), dtype=torch.int64), scores_TE[:, :1], scores_TE[:, 0].long())
        scores_TE = masked(scores_TE, mask_TE)
        probabilities_TE = scores_TE.softmax(dim=1)
        capacity = min(num_rows, math.ceil(num_rows * self.capacity_factor / self.num_experts))
        _, rows_EC = top(masked(probabilities_TE, mask_TE).t(), capacity)
        chosen_TE = members(rows_EC, num_rows).t()
        widest = max(1, int(chosen_TE.sum(dim=1).max()))
        _, indices_TK = top(scores_TE.masked_fill(~chosen_TE, -torch.inf), widest)
        dropped_T = (~chosen_TE.any(dim=1)).long()
        return Routing(indices_TK, pick(probabilities_TE, indices_TK), dropped_T)
