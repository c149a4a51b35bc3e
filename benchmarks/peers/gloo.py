"""Expert parallelism as training frameworks do it: two ranks, half of the experts and of the rows each, all-to-all.

The ranks are processes with one thread. Rows and answers lie in shared memory, as they would be on the ranks anyway;
an order is eight bytes through a socket. Orders may wait at the ranks, so that these are never idle under load.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import tempfile
from collections import deque
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor
from torch import multiprocessing as torch_multiprocessing

from .arm import Arm, ArmUnavailable
from .gloo_rank import RANKS, STEP, Settings, serve
from .model import Shape

SLOTS = 4
MOST_ROWS = 2048
START_SECONDS = 60.0


class Gloo(Arm):
    """All-to-all over gloo; `stall` is the seconds that one of the ranks sleeps in each step."""

    name = "gloo"

    def __init__(self, shape: Shape, dtype: torch.dtype, *, stall: float = 0.0) -> None:
        self.version = f"torch {torch.__version__}, gloo, {RANKS} ranks"
        # Slots S, rows T, features D.
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
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._turn is None:
            self._loop, self._turn = loop, asyncio.Condition()
            for rank, pipe in enumerate(self._pipes):
                loop.add_reader(pipe.fileno(), self._answered, rank)
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
