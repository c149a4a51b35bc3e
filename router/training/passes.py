"""Splits a pass over the rows of a layer among replicas, and adds up what they answer, in a fixed order.

Shapes: T rows, N pairs of a row and an expert, R distinct rows of one replica; rows may have any trailing shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import SpecMismatch
from ...experts.protocol import TrainReply
from ...experts.training.slices import Packed
from .exchange import Part


@dataclass(frozen=True)
class Share:
    """What one replica computes of a pass: its parts, their positions in the pass, and its tensors by name.

    `rows_R` are the positions of its rows, `pairs_N` those of its pairs.
    """

    parts: tuple[Part, ...]
    positions: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    rows_R: Tensor
    pairs_N: Tensor


def split(
    parts: Sequence[Part],
    positions: Sequence[int],
    rows_T: Tensor,
    index_N: Tensor,
    gradients_T: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> Share:
    """The share of a replica with some parts of a pass, at `positions` in it: each of its rows once."""
    pairs_N = torch.cat([torch.arange(parts[at][2], parts[at][3]) for at in positions])
    rows_R, own_N = torch.unique(index_N[pairs_N], return_inverse=True)
    own, start = [], 0
    for at in positions:
        expert, version, first, last, number = parts[at]
        own.append((expert, version, start, start + last - first, number))
        start += last - first
    tensors = {"rows": rows_T.index_select(0, rows_R), "index": own_N}
    if gradients_T is not None:
        tensors["gradients"] = gradients_T.index_select(0, rows_R)
    if weights_N is not None:
        tensors["weights"] = weights_N.index_select(0, pairs_N)
    return Share(tuple(own), tuple(positions), tensors, rows_R, pairs_N)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of a dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(
    parts: Sequence[Part],
    outputs: Mapping[int, Tensor],
    index_N: Tensor,
    weights_N: Tensor | None,
    num_rows: int,
) -> Tensor:
    """Σ w·f(x) [T, ...] over the parts that answered: their outputs by position. Raises SpecMismatch."""
    kinds = {(tuple(output.shape[1:]), output.dtype) for output in outputs.values()}
    if len(kinds) != 1:
        raise SpecMismatch(f"the experts' answers differ and cannot be added up: {sorted(map(str, kinds))}")
    ((shape, dtype),) = kinds
    total_T = torch.zeros((num_rows, *shape), dtype=wide(dtype))
    for at in sorted(outputs):
        _, _, start, stop, _ = parts[at]
        output = outputs[at].to(wide(dtype))
        if weights_N is not None:
            factors = weights_N[start:stop].to(wide(dtype))
            output = output * factors.reshape(-1, *(1,) * len(shape))
        total_T.index_add_(0, index_N[start:stop], output)
    return total_T.to(dtype)


def slices_of(parts: Sequence[Part], counts: Mapping[str, int]) -> tuple[list[Part], list[int]]:
    """The slices of parts, `counts[expert]` of each, none empty, and the position of the part of each.

    The number of a slice takes the place of that of the pass.
    """
    slices: list[Part] = []
    owners: list[int] = []
    for at, (expert, version, start, stop, _) in enumerate(parts):
        size, left = divmod(stop - start, counts[expert])
        for number in range(counts[expert]):
            end = start + size + (number < left)
            if end > start:
                slices.append((expert, version, start, end, number))
                owners.append(at)
            start = end
    return slices, owners


def folded(outcomes: Mapping[int, Mapping[str, Any]], owners: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The outcome of each part, from those of its slices: that of the first that did not go well."""
    found: dict[int, dict[str, Any]] = {}
    for at, owner in enumerate(owners):
        if owner not in found or "ok" in found[owner]:
            found[owner] = dict(outcomes[at])
    return found


def gradients_of_slices(answered: Sequence[tuple[Share, TrainReply]]) -> dict[int, Packed]:
    """The gradients of the parameters that slices came to, by the position of the slice."""
    found: dict[int, Packed] = {}
    for share, reply in answered:
        if "values" not in reply.tensors:
            continue
        values, sizes = reply.tensors["values"], reply.tensors["sizes"]
        parts = torch.split(values, sizes[:, 2].tolist())
        for number, at in enumerate(share.positions):
            own = (sizes[:, 0] == number).nonzero().flatten().tolist()
            if own:
                found[at] = torch.cat([parts[index] for index in own]), sizes[own, 1:]
    return found


def outputs_of(share: Share, reply: TrainReply) -> dict[int, Tensor]:
    """The outputs of a forward pass by position in the pass; those of parts that failed are missing."""
    found, start = {}, 0
    for at, part, outcome in zip(share.positions, share.parts, reply.outcomes, strict=True):
        if "ok" in outcome:
            count = part[3] - part[2]
            found[at] = reply.tensors["outputs"][start : start + count]
            start += count
    return found


def all_failed(count: int, error: str, message: str) -> tuple[dict[str, Any], ...]:
    """The outcomes of parts whose message failed as a whole."""
    return tuple({"error": error, "message": message} for _ in range(count))
