"""Gradients of parts of a pass, computed by several replicas: as tensors of a message, and their sum.

A slice of an expert's rows has a number. Whoever computes it, its random numbers and its gradients are the same; so the
sum, in the order of the numbers, is the same whichever replicas take part. Shapes: G values in all, P gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InvalidRequest

Packed = tuple[Tensor, Tensor]
"""Values [G], one gradient after the other, and int64 [P, 2]: the position of each one's parameter, and its size."""


def seed_of_slice(seed: int, number: int) -> int:
    """The seed of a slice; the first one has that of the pass."""
    return seed if number == 0 else (seed * 1_000_003 ^ number) % 2**62


def pack(gradients: Sequence[Tensor | None]) -> Packed:
    """Gradients by parameter as tensors, in a dtype to be added up in, float32 or float64; None has no entry."""
    given = [(at, gradient) for at, gradient in enumerate(gradients) if gradient is not None]
    wide = torch.float64 if any(gradient.dtype == torch.float64 for _, gradient in given) else torch.float32
    sizes = torch.tensor([[at, gradient.numel()] for at, gradient in given], dtype=torch.int64).reshape(-1, 2)
    if not given:
        return torch.empty(0, dtype=wide), sizes
    return torch.cat([gradient.reshape(-1).to(wide) for _, gradient in given]), sizes


def unpack(packed: Packed, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients like `parameters`, in their dtypes. Raises InvalidRequest for those of others."""
    values, sizes = packed
    found: list[Tensor | None] = [None] * len(parameters)
    for at, value in _each(values, sizes):
        if at >= len(parameters) or value.numel() != parameters[at].numel():
            raise InvalidRequest("the gradients of slices are those of another expert")
        found[at] = value.reshape(parameters[at].shape).to(parameters[at].device, parameters[at].dtype)
    return found


def added(slices: Iterable[Packed]) -> Packed:
    """The sum of the gradients of slices, in their order. Raises InvalidRequest if they do not fit together."""
    total: dict[int, Tensor] = {}
    kind = torch.float32
    for values, sizes in slices:
        kind = values.dtype
        for at, value in _each(values, sizes):
            if at in total and total[at].shape != value.shape:
                raise InvalidRequest("the gradients of slices are those of different experts")
            total[at] = total[at] + value if at in total else value
    ordered = sorted(total)
    sizes = torch.tensor([[at, total[at].numel()] for at in ordered], dtype=torch.int64).reshape(-1, 2)
    return torch.cat([total[at] for at in ordered]) if ordered else torch.empty(0, dtype=kind), sizes


def _each(values: Tensor, sizes: Tensor) -> Iterable[tuple[int, Tensor]]:
    if values.ndim != 1 or sizes.ndim != 2 or sizes.shape[1:] != (2,) or sizes.dtype != torch.int64:
        raise InvalidRequest("the gradients of slices must be values [G], with sizes int64 [P, 2]")
    if bool((sizes < 0).any()) or int(sizes[:, 1].sum()) != len(values):
        raise InvalidRequest("the gradients of slices have other sizes than they say")
    parts = torch.split(values, sizes[:, 1].tolist())
    return zip(sizes[:, 0].tolist(), parts, strict=True)
