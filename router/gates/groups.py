"""Group-limited selection: experts in equal groups, of which each row may use only the best few.

Shapes: T rows, E experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from .selection import members, top


def check_groups(num_experts: int, groups: int, top_groups: int) -> None:
    """Raise ConfigError where the experts do not divide into the groups or more groups are kept than there are."""
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        raise ConfigError(
            f"groups={groups} must divide num_experts={num_experts}, and top_groups={top_groups} be 1 to groups"
        )


def limit_groups(scores_TE: Tensor, groups: int, kept: int, *, best: int) -> Tensor:
    """Set the scores outside the `kept` best groups to -inf.

    A group counts with the sum of its `best` highest scores: 2 in DeepSeek-V3 (§2.1.2), 1 in DeepSeek-V2. Experts of
    score -inf (denied ones) do not count, and a group of nothing else is never kept before another.
    """
    scores_TGe = scores_TE.view(scores_TE.shape[0], groups, scores_TE.shape[1] // groups)
    best_TG = scores_TGe.topk(min(best, scores_TGe.shape[2]), dim=2).values
    sums_TG = (
        best_TG.masked_fill(best_TG == -torch.inf, 0).sum(dim=2).masked_fill(best_TG[..., 0] == -torch.inf, -torch.inf)
    )
    _, chosen_TK = top(sums_TG, kept)
    keep_TG = members(chosen_TK, groups)
    return scores_TGe.masked_fill(~keep_TG[..., None], -torch.inf).flatten(1)
