"""Exact selection of experts from scores: masks first, ties to the lower expert index, bad input refused.

Shapes: T rows, E experts, K choices a row, G groups of e experts each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...experts.errors import ConfigError, InvalidRequest, SpecMismatch

SMALL = 2048
"""Up to so many scores a stable sort is faster than a top-k and the check that makes it exact."""


def checked_scores(scores_TE: Tensor, num_experts: int) -> Tensor:
    """Return `scores_TE` in float32 (float64 stays), shape [T, E].

    Raises SpecMismatch for another shape and InvalidRequest for NaN or infinite scores.
    """
    if scores_TE.dim() != 2 or scores_TE.shape[1] != num_experts:
        raise SpecMismatch(f"scores have shape {tuple(scores_TE.shape)}, but the gate needs [rows, {num_experts}]")
    if scores_TE.dtype != torch.float64:
        scores_TE = scores_TE.float()
    # A sum is one pass without a temporary; it is infinite for huge finite scores too, hence the exact second look.
    if not math.isfinite(scores_TE.detach().sum().item()):
        bad_T = ~scores_TE.detach().isfinite().all(dim=1)
        if bad_T.any():
            raise InvalidRequest(
                f"the gate's scores of {int(bad_T.sum())} rows (first: row {int(bad_T.nonzero()[0])}) are NaN or "
                "infinite: look for NaN in the features or in the gate's weights"
            )
    return scores_TE


def checked_mask(mask_TE: Tensor | None, scores_TE: Tensor) -> Tensor | None:
    """Return the mask as bool [T, E], True = allowed; [E] means the same mask for every row.

    Raises SpecMismatch for another shape or dtype and InvalidRequest where a row is left without an expert.
    """
    if mask_TE is None:
        return None
    if mask_TE.dtype != torch.bool or mask_TE.shape not in (scores_TE.shape, scores_TE.shape[1:]):
        raise SpecMismatch(
            f"mask is {mask_TE.dtype} of shape {tuple(mask_TE.shape)}, but must be torch.bool of shape "
            f"{tuple(scores_TE.shape)} or [{scores_TE.shape[1]}]"
        )
    mask_TE = mask_TE.to(scores_TE.device).expand(scores_TE.shape)
    empty_T = ~mask_TE.any(dim=1)
    if empty_T.any():
        raise InvalidRequest(
            f"allow/deny leaves {int(empty_T.sum())} rows (first: row {int(empty_T.nonzero()[0])}) without any "
            "expert: allow at least one"
        )
    return mask_TE


def masked(scores_TE: Tensor, mask_TE: Tensor | None) -> Tensor:
    """Scores with -inf for every expert that is not allowed."""
    return scores_TE if mask_TE is None else scores_TE.masked_fill(~mask_TE, -torch.inf)


def top(scores_TE: Tensor, k: int, *, holes: bool = True) -> tuple[Tensor, Tensor]:
    """Values and indices, both [T, K], of the `k` largest scores of each row, best first, ties by the lower index.

    Scores of -inf are never chosen: the index -1 (and the value -inf) stands in their place. `holes=False` says that
    there are none. The values are differentiable. `torch.topk` orders equal scores as it likes, so its answer is
    taken only for rows whose scores differ from one to the next, also across the border of the selection.
    """
    k = min(k, scores_TE.shape[1])
    if scores_TE.numel() <= SMALL or k == scores_TE.shape[1]:
        values, indices = scores_TE.sort(dim=1, descending=True, stable=True)
        values_TK, indices_TK = values[:, :k], indices[:, :k]
    else:
        values, indices = scores_TE.detach().topk(k + 1, dim=1)
        tied_T = (values[:, :-1] == values[:, 1:]).any(dim=1)
        if tied_T.any():
            indices[tied_T] = scores_TE.detach()[tied_T].argsort(dim=1, descending=True, stable=True)[:, : k + 1]
        indices_TK = indices[:, :k]
        values_TK = scores_TE.gather(1, indices_TK)
    if holes:
        indices_TK = indices_TK.masked_fill(values_TK == -torch.inf, -1)
    return values_TK, indices_TK


def pick(scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """Values [T, K] of the chosen experts, 0 where the index is -1; differentiable in the scores."""
    return scores_TE.gather(1, indices_TK.clamp(min=0)).masked_fill(indices_TK < 0, 0)


def exact_sigmoid(scores_TE: Tensor) -> Tensor:
    """Sigmoid that gives equal scores equal values wherever they stand in the tensor.

    In float32 the vector and the scalar code of one kernel differ in the last bit, which would decide ties.
    """
    return scores_TE.double().sigmoid().to(scores_TE.dtype)


def members(indices_TK: Tensor, size: int) -> Tensor:
    """Bool [T, size]: which of 0 .. size - 1 each row of indices holds; -1 holds nothing."""
    found = torch.zeros(indices_TK.shape[0], size + 1, dtype=torch.bool, device=indices_TK.device)
    return found.scatter_(1, indices_TK + 1, True)[:, 1:]


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
