"""Exact selection of experts from scores: masks come first, ties go to the lower index, bad input is rejected.

Shapes: T rows, E experts, K choices per row, G groups of e experts each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...experts.errors import ConfigError, InvalidRequest, SpecMismatch

SORT_LIMIT = 2048
"""Up to this many scores, a stable sort is faster than a top-k plus the check that makes it exact."""


def checked_scores(scores_TE: Tensor, num_experts: int) -> Tensor:
    """Return `scores_TE` [T, E] in float32 (float64 stays).

    Raises SpecMismatch for another shape and InvalidRequest for NaN or infinite scores.
    """
    if scores_TE.dim() != 2 or scores_TE.shape[1] != num_experts:
        raise SpecMismatch(f"scores have shape {tuple(scores_TE.shape)}, but the gate needs [rows, {num_experts}]")
    if scores_TE.dtype != torch.float64:
        scores_TE = scores_TE.float()
    # A sum takes one pass and no temporary. Huge finite scores overflow it too, so those get the exact check.
    if not math.isfinite(scores_TE.detach().sum().item()):
        bad_T = ~scores_TE.detach().isfinite().all(dim=1)
        if bad_T.any():
            raise InvalidRequest(
                f"the gate's scores of {int(bad_T.sum())} rows (first: row {int(bad_T.nonzero()[0])}) are NaN or "
                "infinite: check the features and the gate's weights for NaN"
            )
    return scores_TE


def checked_mask(mask_TE: Tensor | None, scores_TE: Tensor) -> Tensor | None:
    """Return the mask as bool [T, E], True = allowed; [E] means the same mask for every row.

    Raises SpecMismatch for another shape or dtype and InvalidRequest for a row with no allowed expert.
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
            "expert: allow at least one for each row"
        )
    return mask_TE


def masked(scores_TE: Tensor, mask_TE: Tensor | None) -> Tensor:
    """The scores, with -inf for every denied expert."""
    return scores_TE if mask_TE is None else scores_TE.masked_fill(~mask_TE, -torch.inf)


def top(scores_TE: Tensor, k: int, *, holes: bool = True) -> tuple[Tensor, Tensor]:
    """The `k` largest scores of each row, best first, ties by the lower index: values and indices, both [T, K].

    Scores of -inf are never chosen: they give the index -1 (and the value -inf). `holes=False` promises that there are
    none. The values are differentiable. `torch.topk` orders equal scores arbitrarily, so rows with a tie among their
    k + 1 largest scores are sorted instead.
    """
    k = min(k, scores_TE.shape[1])
    if scores_TE.numel() <= SORT_LIMIT or k == scores_TE.shape[1]:
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
    """The values [T, K] of the chosen experts, 0 where the index is -1; differentiable in the scores."""
    return scores_TE.gather(1, indices_TK.clamp(min=0)).masked_fill(indices_TK < 0, 0)


def exact_sigmoid(scores_TE: Tensor) -> Tensor:
    """Sigmoid that maps equal scores to equal values at any position in the tensor.

    In float32 the vector and scalar code of the kernel differ in the last bit, which would decide ties.
    """
    return scores_TE.double().sigmoid().to(scores_TE.dtype)


def members(indices_TK: Tensor, size: int) -> Tensor:
    """Bool [T, size]: which of the numbers 0 .. size - 1 each row of indices contains; -1 is ignored."""
    present = torch.zeros(indices_TK.shape[0], size + 1, dtype=torch.bool, device=indices_TK.device)
    return present.scatter_(1, indices_TK + 1, True)[:, 1:]


def check_groups(num_experts: int, groups: int, top_groups: int) -> None:
    """Raise ConfigError if the groups do not divide the experts evenly, or `top_groups` is out of range."""
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        raise ConfigError(
            f"groups={groups} must divide num_experts={num_experts}, and top_groups={top_groups} must be 1 to {groups}"
        )


def limit_groups(scores_TE: Tensor, groups: int, kept: int, *, best: int) -> Tensor:
    """Set the scores outside the `kept` best groups to -inf.

    The score of a group is the sum of its `best` highest scores: 2 in DeepSeek-V3 (§2.1.2), 1 in DeepSeek-V2. Denied
    experts (-inf) do not count, and a group with only denied experts ranks last.
    """
    scores_TGe = scores_TE.view(scores_TE.shape[0], groups, scores_TE.shape[1] // groups)
    best_TG = scores_TGe.topk(min(best, scores_TGe.shape[2]), dim=2).values
    sums_TG = (
        best_TG.masked_fill(best_TG == -torch.inf, 0).sum(dim=2).masked_fill(best_TG[..., 0] == -torch.inf, -torch.inf)
    )
    _, chosen_TK = top(sums_TG, kept)
    keep_TG = members(chosen_TK, groups)
    return scores_TGe.masked_fill(~keep_TG[..., None], -torch.inf).flatten(1)
