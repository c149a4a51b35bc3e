"""Experts with much to compute for few bytes of rows, so that they are the limit of a cluster and not its messages."""

from __future__ import annotations

import torch
from benchmarks.peers.model import Shape, expert

WIDTH = 128
SHAPE = Shape(4, 1, WIDTH, 32_768)
"""As many multiplications a row as an expert of L, and an eighth of its bytes."""


def make(index: int) -> torch.nn.Module:
    """Expert `index`, in float32."""
    return expert(SHAPE, index, torch.float32)
