"""k-means in torch, seeded; with `balanced`, all clusters have the same size.

Shapes: N points, D features, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, SpecMismatch

STARTS = 3
"""Runs from different centres, of which the best is kept."""

ROUNDS = 100
"""The most rounds of one run."""


@dataclass(frozen=True)
class Clusters:
    """The centres [K, D], the cluster of each point (int64 [N]), and the sum of squared distances to the centres."""

    centres_KD: Tensor
    labels_N: Tensor
    inertia: float


def k_means(points_ND: Tensor, k: int, *, balanced: bool = False, seed: int = 0) -> Clusters:
    """Divide points (floating point [N, D]) into k clusters; the same seed gives the same clusters.

    The start is k-means++ (Arthur and Vassilvitskii 2007), then centres and clusters are computed in turns (Lloyd
    1982). A centre that loses all its points moves to the point farthest from its own; among fewer than k different
    points, clusters stay empty. With `balanced` each cluster has N / k points: those closest to a centre that has room
    go first, which is greedy and not the best division of that size.

    Raises ConfigError unless 1 ≤ k ≤ N, and N is a multiple of k if `balanced`; SpecMismatch for other shapes, dtypes
    or values that are not finite.
    """
    if points_ND.dim() != 2 or not points_ND.is_floating_point() or not points_ND.isfinite().all():
        raise SpecMismatch(
            f"k-means got {list(points_ND.shape)} {points_ND.dtype}, but needs finite floating-point points of shape "
            "[points, features]"
        )
    count = points_ND.shape[0]
    if not 1 <= k <= count or (balanced and count % k):
        divided = ", and divide it, for clusters of equal size" if balanced else ""
        raise ConfigError(f"k is {k}, but must be between 1 and {count}, the number of points{divided}")
    points_ND = points_ND if points_ND.dtype == torch.float64 else points_ND.float()
    generator = torch.Generator().manual_seed(seed)
    runs = [_run(points_ND, _start(points_ND, k, generator), balanced) for _ in range(STARTS)]
    return min(runs, key=lambda clusters: clusters.inertia)


def _start(points_ND: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres that are points, each drawn in proportion to its squared distance from those before it."""
    chosen = [int(torch.randint(points_ND.shape[0], (), generator=generator))]
    squared_N = _squared(points_ND, points_ND[chosen])[:, 0]
    while len(chosen) < k:
        total_N = squared_N.double().cumsum(0)
        drawn = torch.rand((1,), generator=generator, dtype=torch.float64).to(total_N) * total_N[-1]
        chosen.append(min(int(torch.searchsorted(total_N, drawn, right=True)), points_ND.shape[0] - 1))
        squared_N = torch.minimum(squared_N, _squared(points_ND, points_ND[chosen[-1:]])[:, 0])
    return points_ND[chosen]


def _run(points_ND: Tensor, centres_KD: Tensor, balanced: bool) -> Clusters:
    """Rounds until no point changes its cluster."""
    assign = _balanced if balanced else _nearest
    labels_N = assign(_squared(points_ND, centres_KD))
    for _ in range(ROUNDS):
        centres_KD = _centres(points_ND, labels_N, centres_KD)
        before_N, labels_N = labels_N, assign(_squared(points_ND, centres_KD))
        if torch.equal(before_N, labels_N):
            break
    inertia = float((points_ND - centres_KD[labels_N]).square().sum())
    return Clusters(centres_KD, labels_N, inertia)


def _squared(points_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Squared distances [N, K], from differences: an expanded square would round close points to zero."""
    return torch.cdist(points_ND, centres_KD, compute_mode="donot_use_mm_for_euclid_dist").square()


def _centres(points_ND: Tensor, labels_N: Tensor, before_KD: Tensor) -> Tensor:
    counts_K = torch.bincount(labels_N, minlength=len(before_KD))
    sums_KD = torch.zeros_like(before_KD).index_add_(0, labels_N, points_ND)
    centres_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp(min=1)[:, None], before_KD)
    empty = (counts_K == 0).nonzero()[:, 0]
    if len(empty):
        far_N = (points_ND - centres_KD[labels_N]).square().sum(dim=1)
        centres_KD[empty] = points_ND[far_N.topk(len(empty)).indices]
    return centres_KD


def _nearest(squared_NK: Tensor) -> Tensor:
    return squared_NK.argmin(dim=1)


def _balanced(squared_NK: Tensor) -> Tensor:
    """Pairs of a point and a cluster by distance: each point takes its first cluster that has room."""
    count, k = squared_NK.shape
    labels, room = [-1] * count, [count // k] * k
    for pair in squared_NK.flatten().argsort(stable=True).tolist():
        point, cluster = divmod(pair, k)
        if labels[point] < 0 and room[cluster]:
            labels[point] = cluster
            room[cluster] -= 1
    return torch.tensor(labels, device=squared_NK.device)
