"""The training rows of each sub-model: at random, by label, or by regions of the features.

Every function returns bool [T, E]: whether sub-model e trains on row t. Each row belongs to `nearest` sub-models;
beyond these, every sub-model also sees `share` of all other rows, drawn at random with the `seed`.

Shapes: T rows, D features, E sub-models (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, SpecMismatch
from .k_means import k_means


def by_random(num_rows: int, num_experts: int, *, nearest: int = 1, share: float = 0.0, seed: int = 0) -> Tensor:
    """Subsets of equal size (± `nearest`) drawn at random.

    Raises ConfigError for options out of range, or fewer rows than experts.
    """
    _check(num_experts, nearest, share)
    rank_T = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    belongs_TK = (rank_T[:, None] + torch.arange(nearest)) % num_experts
    return _with_others(belongs_TK, num_experts, share, seed)


def by_label(labels_T: Tensor, num_experts: int, *, nearest: int = 1, share: float = 0.0, seed: int = 0) -> Tensor:
    """All rows of a label (integers [T]) go to the same sub-models.

    The largest labels are given out first, each to the `nearest` sub-models that have the fewest rows so far. Raises
    SpecMismatch for labels of another shape or dtype; ConfigError for options out of range, or labels that are too few
    to give each sub-model one.
    """
    _check(num_experts, nearest, share)
    if labels_T.dim() != 1 or labels_T.is_floating_point() or labels_T.is_complex():
        raise SpecMismatch(
            f"labels have shape {list(labels_T.shape)} and {labels_T.dtype}, but must be integers of shape [rows]"
        )
    _, class_T, counts_C = torch.unique(labels_T, return_inverse=True, return_counts=True)
    sizes_E = torch.zeros(num_experts, dtype=torch.int64)
    takes_CK = torch.zeros(len(counts_C), nearest, dtype=torch.int64)
    for label in counts_C.argsort(descending=True, stable=True).tolist():
        takes_CK[label] = sizes_E.argsort(stable=True)[:nearest]
        sizes_E[takes_CK[label]] += counts_C[label].cpu()
    return _with_others(takes_CK.to(class_T.device)[class_T], num_experts, share, seed)


def by_cluster(features_TD: Tensor, num_experts: int, *, nearest: int = 1, share: float = 0.0, seed: int = 0) -> Tensor:
    """One region of the features (floating point [T, D]) for each sub-model, by k-means.

    Raises what `k_means` and `by_centre` raise.
    """
    _check(num_experts, nearest, share)
    centres_ED = k_means(features_TD, num_experts, seed=seed).centres_KD
    return by_centre(features_TD, centres_ED, nearest=nearest, share=share, seed=seed)


def by_centre(
    features_TD: Tensor, centres_ED: Tensor, *, nearest: int = 1, share: float = 0.0, seed: int = 0
) -> Tensor:
    """Each row (floating point [T, D]) goes to the sub-models of the `nearest` centres [E, D], by Euclidean distance.

    Raises SpecMismatch for shapes that do not fit; ConfigError for options out of range, or a centre without rows.
    """
    if features_TD.dim() != 2 or centres_ED.dim() != 2 or features_TD.shape[1] != centres_ED.shape[1]:
        raise SpecMismatch(
            f"features have shape {list(features_TD.shape)} and centres {list(centres_ED.shape)}, but must be "
            "[rows, features] and [experts, features]"
        )
    num_experts = len(centres_ED)
    _check(num_experts, nearest, share)
    distances_TE = torch.cdist(features_TD.to(centres_ED.dtype), centres_ED)
    return _with_others(distances_TE.topk(nearest, largest=False).indices, num_experts, share, seed)


def _check(num_experts: int, nearest: int, share: float) -> None:
    if num_experts < 1 or not 1 <= nearest <= num_experts or not 0 <= share <= 1:
        raise ConfigError(
            f"subsets need num_experts of at least 1, nearest between 1 and num_experts, and share between 0 and 1; "
            f"got num_experts={num_experts}, nearest={nearest}, share={share}"
        )


def _with_others(belongs_TK: Tensor, num_experts: int, share: float, seed: int) -> Tensor:
    """Bool [T, E] from the sub-models that each row belongs to, and a share of all others."""
    seen_TE = F.one_hot(belongs_TK, num_experts).any(dim=1)
    empty = [expert for expert, rows in enumerate(seen_TE.sum(dim=0).tolist()) if rows == 0]
    if empty:
        raise ConfigError(
            f"{len(empty)} of {num_experts} experts get no rows (first: expert {empty[0]}): use fewer experts, a "
            "larger nearest, or more rows or labels"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    others_TE = torch.rand(seen_TE.shape, generator=generator) < share
    return seen_TE | others_TE.to(seen_TE.device)
