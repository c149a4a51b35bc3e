"""Expert parallelism as training frameworks do it: two ranks, half of the experts and of the rows each, all-to-all.

The ranks are processes with one thread. Rows and answers lie in shared memory, as they would be on the ranks anyway;
an order is eight bytes through a socket. Orders may wait at the ranks, so that these are never idle under load.

Shapes: S slots of the shared memory, T rows of a batch or of a rank, D features, E experts, N pairs of a row of a rank
and an expert, M pairs of all ranks whose expert is on this one.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import shutil
import struct
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as torch_multiprocessing

from expertmesh.experts.modules import PackedExperts
from expertmesh.router.mixture.combine import combine
from expertmesh.router.mixture.dispatch import dispatch

from .arm import Arm, ArmUnavailable
from .model import Shape, gate, packed

SLOTS = 4
MOST_ROWS = 2048
START_SECONDS = 60.0
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


class Gloo(Arm):
    """All-to-all over gloo; `stall` is the seconds that one of the ranks sleeps in each step."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, stall: float = 0.0) -> None:
        self.version = f"torch {torch.__version__}, gloo, {RANKS} ranks"
        self._x_STD: Tensor = torch.empty(SLOTS, MOST_ROWS, shape.width, dtype=dtype)
        self._y_STD: Tensor = torch.empty_like(self._x_STD)
        for shared_STD in (self._x_STD, self._y_STD):
            shared_STD.share_memory_()  # type: ignore[no-untyped-call]
        self._free = deque(range(SLOTS))
        self._turn: asyncio.Condition | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[deque[asyncio.Future[None]]] = [deque() for _ in range(RANKS)]
        with ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="expertmesh-peers-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            settings = Settings(shape, dtype, str(Path(folder) / "rendezvous"), stall)
            self._pipes = [self._start(stack, rank, settings) for rank in range(RANKS)]
            for pipe in self._pipes:
                if not pipe.poll(START_SECONDS):
                    raise ArmUnavailable("the ranks of torch.distributed did not find each other")
                pipe.recv_bytes()
            self._stack = stack.pop_all()

    async def call(self, x_TD: Tensor) -> Tensor:
        rows = x_TD.shape[0]
        if rows > MOST_ROWS:
            raise ValueError(f"{rows} rows are more than the {MOST_ROWS} that the shared memory has room for")
        turn = self._listen()
        async with turn:
            await turn.wait_for(lambda: self._free)
            slot = self._free.popleft()
        self._x_STD[slot, :rows] = x_TD
        await asyncio.gather(*(self._order(rank, slot, rows) for rank in range(RANKS)))
        y_TD = self._y_STD[slot, :rows].clone()
        async with turn:
            self._free.append(slot)
            turn.notify()
        return y_TD

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for pipe in self._pipes:
                self._loop.remove_reader(pipe.fileno())
        self._stack.close()

    def _start(self, stack: ExitStack, rank: int, settings: Settings) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        process = torch_multiprocessing.get_context("spawn").Process(
            target=serve, args=(rank, settings, theirs, self._x_STD, self._y_STD), daemon=True
        )
        process.start()
        theirs.close()
        stack.callback(_end, process)
        stack.callback(ours.close)  # runs first: the rank sees the end of its orders
        return ours

    def _order(self, rank: int, slot: int, rows: int) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[rank].append(done)
        self._pipes[rank].send_bytes(STEP.pack(slot, rows))
        return done

    def _listen(self) -> asyncio.Condition:
        if self._turn is None:
            self._loop, self._turn = asyncio.get_running_loop(), asyncio.Condition()
            for rank, pipe in enumerate(self._pipes):
                self._loop.add_reader(pipe.fileno(), self._answered, rank)
        return self._turn

    def _answered(self, rank: int) -> None:
        try:
            self._pipes[rank].recv_bytes()
        except (EOFError, OSError) as error:
            for waiting in self._waiting[rank]:
                waiting.set_exception(ArmUnavailable(f"rank {rank} has ended: {error!r}"))
            self._waiting[rank].clear()
            if self._loop is not None:
                self._loop.remove_reader(self._pipes[rank].fileno())
            return
        self._waiting[rank].popleft().set_result(None)


def _end(process: BaseProcess) -> None:
    process.join(5.0)
    if process.is_alive():
        process.kill()
        process.join()


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
