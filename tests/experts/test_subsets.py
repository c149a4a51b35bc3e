"""k-means and the training rows of sub-models: every row has its place, sizes are as promised, a seed repeats them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.training import subsets
from expertmesh.experts.training.k_means import k_means

WIDTH, CLASSES = 6, 4


def blobs(rows: int, groups: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows in well-separated groups, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    labels_T = torch.arange(rows) % groups
    return torch.randn(rows, WIDTH, generator=generator) + 12 * torch.eye(groups, WIDTH)[labels_T], labels_T


@given(count=st.integers(1, 30), k=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_clusters_are_a_fixed_point_of_k_means(count: int, k: int, seed: int) -> None:
    points_ND = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    if k > count:
        with pytest.raises(ConfigError, match=f"between 1 and {count}, the number of points$"):
            k_means(points_ND, k)
        return
    found = k_means(points_ND, k, seed=seed)
    assert sorted(set(found.labels_N.tolist())) == list(range(k))
    torch.testing.assert_close(found.labels_N, torch.cdist(points_ND, found.centres_KD).argmin(dim=1))
    for cluster in range(k):
        torch.testing.assert_close(found.centres_KD[cluster], points_ND[found.labels_N == cluster].mean(dim=0))
    assert found.inertia <= float((points_ND - points_ND.mean(dim=0)).square().sum()) + 1e-4


@given(size=st.integers(1, 5), k=st.integers(1, 5), same=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_balanced_clusters_have_equal_sizes(size: int, k: int, same: bool, seed: int) -> None:
    points_ND = torch.randn(size * k, 2, generator=torch.Generator().manual_seed(seed))
    found = k_means(torch.ones_like(points_ND) if same else points_ND, k, balanced=True, seed=seed)
    assert torch.bincount(found.labels_N, minlength=k).tolist() == [size] * k


def test_k_means_finds_groups_that_are_far_apart() -> None:
    x_TD, labels_T = blobs(80)
    for balanced in (False, True):
        found = k_means(x_TD, CLASSES, balanced=balanced).labels_N
        assert len({*zip(found.tolist(), labels_T.tolist(), strict=True)}) == CLASSES
    again = k_means(x_TD, CLASSES, seed=3), k_means(x_TD, CLASSES, seed=3)
    assert torch.equal(again[0].centres_KD, again[1].centres_KD)


def test_fewer_different_points_than_clusters() -> None:
    found = k_means(torch.tensor([[0.0], [0.0], [9.0]]), 3)
    assert found.inertia == 0
    with pytest.raises(ConfigError, match="3 experts get no rows"):
        subsets.by_cluster(torch.tensor([[0.0], [0.0], [9.0]]), 3)


@pytest.mark.parametrize(
    "points", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), torch.nan)]
)
def test_k_means_refuses_what_are_no_points(points: Tensor) -> None:
    with pytest.raises(SpecMismatch, match=r"needs finite floating-point points of shape \[points, features\]"):
        k_means(points, 2)
    with pytest.raises(ConfigError, match="and divide it, for clusters of equal size"):
        k_means(torch.zeros(5, 2), 2, balanced=True)


@given(
    rows=st.integers(8, 60),
    experts=st.integers(1, 6),
    nearest=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 20),
)
@settings(max_examples=60)
def test_every_row_has_its_place(rows: int, experts: int, nearest: int, share: float, seed: int) -> None:
    nearest = min(nearest, experts)
    options: dict[str, Any] = {"nearest": nearest, "share": share, "seed": seed}
    x_TD = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    labels_T = torch.arange(rows) % 8
    ways = [
        lambda: subsets.by_random(rows, experts, **options),
        lambda: subsets.by_label(labels_T, experts, **options),
        lambda: subsets.by_cluster(x_TD, experts, **options),
    ]
    for way in ways:
        seen_TE = way()
        assert (seen_TE.dtype, seen_TE.shape) == (torch.bool, (rows, experts))
        assert torch.equal(seen_TE, way())
        assert seen_TE.any(dim=0).all()
        places_T = seen_TE.sum(dim=1)
        assert bool((places_T >= nearest).all())
        if share == 0:
            assert bool((places_T == nearest).all())
        if share == 1:
            assert bool(seen_TE.all())


def test_the_share_is_one_of_all_other_rows() -> None:
    seen_TE = subsets.by_random(4000, 4, share=0.25)
    assert float(seen_TE.float().mean()) == pytest.approx(0.25 + 0.75 * 0.25, abs=0.02)
    labels_T = torch.arange(400) % 4
    first_TE, other_TE = (subsets.by_label(labels_T, 4, share=0.25, seed=seed) for seed in (0, 1))
    assert not torch.equal(first_TE, other_TE)


def test_random_subsets_are_equal_and_labels_stay_together() -> None:
    assert subsets.by_random(10, 4).sum(dim=0).tolist() == [3, 3, 2, 2]
    labels_T = torch.tensor([7] * 5 + [-1] * 3 + [2] * 2)
    seen_TE = subsets.by_label(labels_T, 2)
    assert seen_TE.tolist() == [[True, False]] * 5 + [[False, True]] * 5
    assert subsets.by_label(labels_T, 3, nearest=2).sum(dim=0).sum() == 20


def test_a_cluster_is_the_nearest_centre() -> None:
    x_TD, labels_T = blobs(40)
    seen_TE = subsets.by_centre(x_TD, 12 * torch.eye(CLASSES, WIDTH))
    assert torch.equal(seen_TE, F.one_hot(labels_T, CLASSES).bool())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: subsets.by_random(9, 2, nearest=3), ConfigError, "got num_experts=2, nearest=3, share=0.0"),
        (lambda: subsets.by_random(9, 2, share=1.5), ConfigError, "share between 0 and 1"),
        (lambda: subsets.by_random(2, 3), ConfigError, r"1 of 3 experts get no rows \(first: expert"),
        (lambda: subsets.by_label(torch.zeros(9), 2), SpecMismatch, r"labels have shape \[9\] and torch.float32"),
        (lambda: subsets.by_label(torch.zeros(9).long(), 2), ConfigError, "first: expert 1"),
        (lambda: subsets.by_cluster(torch.zeros(9, 2), 0), ConfigError, "num_experts of at least 1"),
        (lambda: subsets.by_centre(torch.zeros(9, 2), torch.zeros(2, 3)), SpecMismatch, r"\[9, 2\] and centres"),
    ],
)  # fmt: skip
def test_bad_subsets_are_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def trained(model: torch.nn.Module, x_TD: Tensor, y_T: Tensor, epochs: int) -> list[float]:
    """Adam and cross-entropy over all rows; the loss of each epoch."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(epochs):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x_TD), y_T)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("by", ["random", "label", "cluster"])
def test_s6_sub_models_learn_their_own_rows(by: str) -> None:
    """Each sub-model is trained with Adam on its subset: its loss falls, and it knows unseen rows of its own kind."""
    torch.manual_seed(0)
    x_TD, y_T = blobs(240)
    unseen_TD, unseen_T = blobs(80, seed=1)
    seen_TE = {
        "random": lambda: subsets.by_random(240, CLASSES),
        "label": lambda: subsets.by_label(y_T, CLASSES, nearest=2),
        "cluster": lambda: subsets.by_cluster(x_TD, CLASSES, nearest=2),
    }[by]()
    for expert in range(CLASSES):
        rows = seen_TE[:, expert]
        model = FeedForward(WIDTH, 8, out_features=CLASSES)
        losses = trained(model, x_TD[rows], y_T[rows], 60)
        assert losses[-1] < 0.2 * losses[0]
        own = torch.isin(unseen_T, y_T[rows].unique())
        right = model(unseen_TD).argmax(dim=1) == unseen_T
        assert float(right[own].float().mean()) > 0.9
