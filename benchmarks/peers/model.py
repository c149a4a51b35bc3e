"""The layer that every arm computes: shapes, seeded weights, gate, and the answer that all must agree with.

Each weight follows from shape, expert and dtype alone, so that any process can build its part by itself.
Shapes: T rows, D features, F hidden features, E experts, K choices a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertmesh.experts.modules import FeedForward, PackedExperts
from expertmesh.router.gates import TopK
from expertmesh.router.mixture.local import LocalLayer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""How far the rows of two arms may differ, as a share of the largest number in them."""

_GATE_SEED, _ROWS_SEED = 1_000_001, 2_000_003


@dataclass(frozen=True)
class Shape:
    """A layer of plain feed-forward experts (gelu, no bias)."""

    experts: int
    choices: int
    width: int
    hidden: int


SHAPES = {
    "L": Shape(8, 2, 1024, 4096),
    "S": Shape(16, 4, 512, 1024),
    "W": Shape(4, 1, 128, 32_768),
    "T": Shape(4, 2, 16, 32),
}
"""Large; small; wide, with as many multiplications a row as L for an eighth of its bytes; and tiny, for tests."""


def names(shape: Shape, dtype: torch.dtype) -> tuple[str, str]:
    """What shape and dtype are called, for a process that is told them by name."""
    shapes, dtypes = ({value: name for name, value in known.items()} for known in (SHAPES, DTYPES))
    return shapes[shape], dtypes[dtype]


def expert(shape: Shape, index: int, dtype: torch.dtype) -> FeedForward:
    """Expert `index` of a layer. Its weights are drawn in float32 and rounded, so that dtypes are comparable."""
    with torch.device("meta"):
        module = FeedForward(shape.width, shape.hidden, activation="gelu", bias=False)
    generator = torch.Generator().manual_seed(index)
    for linear in (module.up_proj, module.down_proj):
        bound = math.sqrt(3 / linear.in_features)  # answers are about as large as rows: an error shows
        weight = torch.empty(linear.weight.shape).uniform_(-bound, bound, generator=generator)
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return module.eval()


def experts(shape: Shape, dtype: torch.dtype) -> list[FeedForward]:
    """All experts of a layer."""
    return [expert(shape, index, dtype) for index in range(shape.experts)]


def packed(shape: Shape, dtype: torch.dtype) -> PackedExperts:
    """All experts of a layer in stacked tensors."""
    with torch.device("meta"):
        module = PackedExperts(shape.experts, shape.width, shape.hidden, activation="gelu", gated=False)
    modules = experts(shape, dtype)
    module.up_proj = nn.Parameter(torch.stack([m.up_proj.weight for m in modules]), requires_grad=False)
    module.down_proj = nn.Parameter(torch.stack([m.down_proj.weight for m in modules]), requires_grad=False)
    return module.eval()


def gate(shape: Shape) -> TopK:
    """The gate: top-k, softmax over the chosen. It is float32 whatever the experts are, as in most models."""
    module = TopK(shape.width, shape.experts, shape.choices, softmax="after")
    generator = torch.Generator().manual_seed(_GATE_SEED)
    with torch.no_grad():
        module.weight.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(shape.width))
    return module.requires_grad_(False).eval()


def rows(shape: Shape, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`count` rows [T, D] to compute."""
    generator = torch.Generator().manual_seed(_ROWS_SEED + seed)
    return torch.randn(count, shape.width, generator=generator).to(dtype)


def reference(shape: Shape, dtype: torch.dtype) -> LocalLayer:
    """The layer in this process, the simplest way."""
    return LocalLayer(gate(shape), experts(shape, dtype)).eval()


def difference(ours_TD: Tensor, theirs_TD: Tensor) -> float:
    """The largest difference of two arms' rows, as a share of the largest number in them."""
    if ours_TD.shape != theirs_TD.shape:
        raise ValueError(f"rows {tuple(ours_TD.shape)} cannot be compared with rows {tuple(theirs_TD.shape)}")
    scale = float(theirs_TD.float().abs().max())
    return float((ours_TD.float() - theirs_TD.float()).abs().max()) / max(scale, 1e-30)
