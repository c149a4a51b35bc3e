"""The limit of a gRPC client: the bytes of the rows to a server that gives them back, and nothing else.

`rows_per_second` times the bytes of a row is the goodput in one direction; 512 rows of L in bf16 are 1 MiB.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import torch
from torch import Tensor

from .arm import Arm
from .grpc_echo_server import OPTIONS, SERVICE
from .helper import Helper
from .model import Shape


class GrpcEcho(Arm):
    """Raw `grpc.aio` between two processes: a call for each batch, or one stream for all with `streaming`."""

    echoes = True

    def __init__(self, shape: Shape, dtype: torch.dtype, *, streaming: bool = False) -> None:
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        self.version = f"grpcio {grpc.__version__}, {'streaming' if streaming else 'unary'}"
        self._streaming = streaming
        self._helper = Helper(f"{__package__}.grpc_echo_server")
        self._echo: Callable[[bytes], Any] | None = None
        self._last: tuple[Tensor, bytes] | None = None

    async def call(self, x_TD: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x_TD:  # making bytes of rows is not what is measured
            self._last = x_TD, x_TD.view(torch.uint8).numpy().tobytes()
        if self._echo is None:  # here, on the event loop
            self._echo = self._connect()
        answer: bytes = await self._echo(self._last[1])
        return torch.frombuffer(answer, dtype=x_TD.dtype).view(x_TD.shape)

    def close(self) -> None:
        if isinstance(self._echo, Stream):
            self._echo.close()
        self._helper.close()

    def _connect(self) -> Callable[[bytes], Any]:
        options = [*OPTIONS, ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._helper.said}", options=options)
        if self._streaming:
            return Stream(self._channel.stream_stream(f"/{SERVICE}/Stream"))
        return self._channel.unary_unary(f"/{SERVICE}/Unary")  # type: ignore[no-any-return]


class Stream:
    """Payloads through one stream, answered in the order in which they were sent."""

    def __init__(self, method: Callable[[], Any]) -> None:
        self._stream = method()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def __call__(self, payload: bytes) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        async with self._writing:
            self._waiting.append(answer)
            await self._stream.write(payload)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        return await answer

    def close(self) -> None:
        """Wait for no more answers."""
        if self._reader is not None and not self._reader.get_loop().is_closed():
            self._reader.cancel()

    async def _read(self) -> None:
        while (answer := await self._stream.read()) is not grpc.aio.EOF:
            self._waiting.popleft().set_result(answer)
