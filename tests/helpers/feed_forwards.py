"""Feed-forward experts of every kind, drawn by a seed: what the tests of split, fuse and share have in common."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.modules import FeedForward, GatedFeedForward

WIDTH, HIDDEN = 5, 12

KINDS: dict[str, Any] = {
    "plain": lambda width: FeedForward(WIDTH, width),
    "plain relu, 3 outputs": lambda width: FeedForward(WIDTH, width, out_features=3, activation="relu"),
    "plain gelu_tanh, no bias": lambda width: FeedForward(WIDTH, width, activation="gelu_tanh", bias=False),
    "gated": lambda width: GatedFeedForward(WIDTH, width),
    "gated, bias": lambda width: GatedFeedForward(WIDTH, width, activation="sigmoid", bias=True),
}

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 50)


def feed_forward(kind: str, seed: int = 0, width: int = HIDDEN) -> Any:
    """A float64 expert."""
    torch.manual_seed(seed)
    return KINDS[kind](width).double()


def rows(seed: int = 0, count: int = 7) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
