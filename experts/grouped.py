"""Two linear layers of many experts over rows that are sorted by expert: grouped or one by one, whichever is faster.

Shapes: N rows of all experts, R rows at one expert, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = 32
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Stack:
    """The same linear layer of E experts: `weight` [E, O, I], or [E, I, O] if `transposed`, and `bias` [E, O]."""

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    def one(self, rows: Tensor, expert: int) -> Tensor:
        """Rows [R, I] of one expert to [R, O]."""
        weight = self.weight[expert].t() if self.transposed else self.weight[expert]
        return F.linear(rows, weight, None if self.bias is None else self.bias[expert])

    def into(self, out: Tensor, rows: Tensor, expert: int) -> None:
        """Write what `one` gives into `out` [R, O]; not for gradients."""
        weight = self.weight[expert] if self.transposed else self.weight[expert].t()
        if self.bias is None:
            torch.mm(rows, weight, out=out)
        else:
            torch.addmm(self.bias[expert], rows, weight, out=out)

    def each(self, rows_N: Tensor, offsets: Sequence[int]) -> Tensor:
        """Rows [N, I] of all experts to [N, O], one expert after the other."""
        parts = [
            self.one(rows_N[start : offsets[expert + 1]], expert)
            for expert, start in enumerate(offsets[:-1])
            if start < offsets[expert + 1]
        ]
        return torch.cat(parts) if parts else rows_N.new_empty((0, self.weight.shape[2 if self.transposed else 1]))

    def grouped(self, rows_N: Tensor, offsets: Sequence[int]) -> Tensor:
        """Rows [N, I] of all experts to [N, O] by torch's grouped matrix multiply."""
        ends_E = torch.tensor(offsets[1:], dtype=torch.int32, device=rows_N.device)
        weight = self.weight if self.transposed else self.weight.transpose(1, 2)
        out_N = F.grouped_mm(rows_N, weight, offs=ends_E)
        if self.bias is None:
            return out_N
        places_N = torch.arange(rows_N.shape[0], dtype=torch.int32, device=rows_N.device)
        return out_N.add_(self.bias[torch.searchsorted(ends_E, places_N, right=True)])


def two_layers(
    x_N: Tensor, offsets: Sequence[int], first: Stack, second: Stack, hidden: Callable[[Tensor], Tensor]
) -> Tensor:
    """second(hidden(first(x))) of each expert on its rows offsets[e]:offsets[e + 1] of `x_N` [N, I]; returns [N, O].

    Measured: on the CPU, experts with more than `FEW_ROWS` rows on average are best computed one after the other, in
    bf16 at most `CHUNK_ROWS` rows at a time, since their hidden rows stay in the cache; fp32 loses 5-12 % by that. With
    fewer rows all first layers go before all second ones. On CUDA, bf16 goes through torch's grouped matrix multiply.
    """
    if x_N.device.type == "cpu" and x_N.shape[0] > FEW_ROWS * (len(offsets) - 1):
        return _one_by_one(x_N, offsets, first, second, hidden)
    if _grouped_wins(x_N, first.weight, second.weight):
        return second.grouped(hidden(first.grouped(x_N, offsets)), offsets)
    return second.each(hidden(first.each(x_N, offsets)), offsets)


def _one_by_one(
    x_N: Tensor, offsets: Sequence[int], first: Stack, second: Stack, hidden: Callable[[Tensor], Tensor]
) -> Tensor:
    chunks = _chunks(offsets, x_N.dtype)
    if torch.is_grad_enabled() or x_N.dtype.itemsize <= 2:
        return torch.cat([second.one(hidden(first.one(x_N[a:b], expert)), expert) for expert, a, b in chunks])
    width = second.weight.shape[2 if second.transposed else 1]
    out_N = x_N.new_empty((x_N.shape[0], width))  # answers are written where they belong: one copy less
    for expert, a, b in chunks:
        second.into(out_N[a:b], hidden(first.one(x_N[a:b], expert)), expert)
    return out_N


def _grouped_wins(x_N: Tensor, *weights: Tensor) -> bool:
    """Whether grouped_mm can take these and is faster: on the CPU it is a loop without Python, but over all experts."""
    if x_N.device.type == "cpu":
        wins = x_N.shape[0] >= weights[0].shape[0] and x_N.dtype in (torch.bfloat16, torch.float32)
    else:
        wins = x_N.is_cuda and x_N.dtype == torch.bfloat16 and x_N.shape[0] > 0
        wins = wins and torch.cuda.get_device_capability(x_N.device) >= (8, 0)
    return wins and not torch.is_grad_enabled() and all(_aligned(tensor) for tensor in (x_N, *weights))


def _aligned(tensor: Tensor) -> bool:
    """Whether the memory, and every row in it, begins at a multiple of 16 bytes."""
    return tensor.shape[-1] * tensor.element_size() % 16 == 0 == tensor.data_ptr() % 16 and tensor.is_contiguous()


def _chunks(offsets: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(expert, start, stop): all rows of an expert, in two-byte dtypes at most `CHUNK_ROWS` of them."""
    for expert, begin in enumerate(offsets[:-1]):
        size = CHUNK_ROWS if dtype.itemsize <= 2 else max(1, offsets[expert + 1] - begin)
        for start in range(begin, offsets[expert + 1], size):
            yield expert, start, min(start + size, offsets[expert + 1])
