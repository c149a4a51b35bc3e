"""One rank of expert parallelism: it holds half of the experts, and half of the rows of a batch begin on it.

Shapes: T rows of this rank, D features, E experts, N pairs of a row of this rank and an expert, M pairs of all ranks
whose expert is here.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch import distributed as dist

from expertmesh.experts.modules import PackedExperts
from expertmesh.router.mixture.combine import combine
from expertmesh.router.mixture.dispatch import dispatch

from .model import Shape, gate, packed

RANKS = 2
STEP = struct.Struct("<ii")
"""An order to the ranks: which slot of the shared memory, and how many rows are in it."""


@dataclass(frozen=True)
class Settings:
    """What the ranks agree on; `stall` is the seconds that the last rank sleeps in each step."""

    shape: Shape
    dtype: torch.dtype
    rendezvous: str
    stall: float = 0.0


def share(rank: int, rows: int) -> slice:
    """The rows of a batch that begin on a rank."""
    return slice(rows * rank // RANKS, rows * (rank + 1) // RANKS)


def serve(rank: int, settings: Settings, orders: Connection, x_STD: Tensor, y_STD: Tensor) -> None:
    """Compute the steps that are ordered, from and into shared memory, until the other end is closed."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{settings.rendezvous}", rank=rank, world_size=RANKS)
    stall = settings.stall if rank == RANKS - 1 else 0.0
    layer = ParallelLayer(settings.shape, settings.dtype, rank)
    orders.send_bytes(b"ready")
    while True:
        try:
            slot, rows = STEP.unpack(orders.recv_bytes())
        except EOFError:
            break
        mine = share(rank, rows)
        if stall:
            time.sleep(stall)
        with torch.inference_mode():
            y_STD[slot, mine] = layer(x_STD[slot, mine])
        orders.send_bytes(b"done")
    dist.destroy_process_group()


class ParallelLayer:
    """The layer with its experts spread over the ranks: counts, rows and answers go through all-to-all."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rank: int) -> None:
        self._shape, self._here = shape, shape.experts // RANKS
        self._gate = gate(shape)
        everything = packed(shape, dtype)
        mine = slice(rank * self._here, (rank + 1) * self._here)
        self._experts = PackedExperts(self._here, shape.width, shape.hidden, activation="gelu", gated=False)
        for name, parameter in everything.named_parameters():
            setattr(self._experts, name, torch.nn.Parameter(parameter[mine].clone(), requires_grad=False))

    def __call__(self, x_TD: Tensor) -> Tensor:
        handle = dispatch(self._gate(x_TD), self._shape.experts)
        sent_E = torch.tensor([stop - start for start, stop in itertools.pairwise(handle.offsets)])
        came_E = torch.empty_like(sent_E)
        dist.all_to_all_single(came_E, sent_E)
        sent = sent_E.view(RANKS, -1).sum(dim=1).tolist()
        counts = came_E.view(RANKS, -1)  # [from which rank, to which expert here]
        came = counts.sum(dim=1).tolist()
        rows_MD = exchange(x_TD.index_select(0, handle.rows_N), sent, came)
        answers_ND = exchange(self._compute(rows_MD, counts.tolist()), came, sent)
        return combine(handle, answers_ND).output

    def _compute(self, rows_MD: Tensor, counts: list[list[int]]) -> Tensor:
        """The answers to rows that are sorted by rank, then by expert, in the same order."""
        by_rank = [count for one in counts for count in one]
        by_expert = [one[index] for index in range(self._here) for one in counts]
        parts = torch.split(rows_MD, by_rank)
        sorted_MD = torch.cat(
            [parts[rank * self._here + index] for index in range(self._here) for rank in range(RANKS)]
        )
        offsets = [0, *itertools.accumulate(sum(one[index] for one in counts) for index in range(self._here))]
        answers = torch.split(self._experts(sorted_MD, offsets), by_expert)
        return torch.cat([answers[index * RANKS + rank] for rank in range(RANKS) for index in range(self._here)])


def exchange(rows_ND: Tensor, sent: list[int], came: list[int]) -> Tensor:
    """Rows to the ranks, `sent` of them to each; returns those that came, in the order of ranks."""
    bytes_N = rows_ND.contiguous().view(torch.uint8)  # gloo has no bfloat16
    out_N = bytes_N.new_empty((sum(came), bytes_N.shape[1]))
    dist.all_to_all_single(out_N, bytes_N, came, sent)
    return out_N.view(rows_ND.dtype)
