"""Ray Serve: the layer as a composition of deployments, asked through its ingress.

`optimised` sets what the documentation gives for throughput. RAY_SERVE_THROUGHPUT_OPTIMIZED runs user code and routers
in the main loop of a replica, buffers logs, freezes the garbage collector, and opens the ingress at the router itself,
with no proxy between; RAY_SERVE_USE_GRPC_BY_DEFAULT sends calls between replicas by gRPC instead of actor calls. The
third flag there, for HAProxy, only puts a proxy back, which helps where there are many routers. `batched` routers
also merge waiting requests with `serve.batch`. Measured: by default the ingress is a little faster over gRPC, with the
flags over HTTP, and merging is worth seven times the requests there but nothing over gRPC.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import warnings
from collections.abc import Awaitable, Callable

import grpc
import torch
from torch import Tensor

from .arm import Arm, ArmUnavailable
from .helper import Helper
from .model import Shape, names

FLAGS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # ends sooner, and changes nothing else
}
METHOD = "/expertmesh.peers.Layer/Call"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class RayServe(Arm):
    """A client of the ingress, over `protocol` "grpc" or "http"; Serve belongs to a process of its own."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        *,
        optimised: bool = False,
        batched: bool = False,
        protocol: str = "http",
    ) -> None:
        missing = [name for name in ("ray", "fastapi", "starlette") if importlib.util.find_spec(name) is None]
        if missing:
            raise ArmUnavailable(f"{', '.join(missing)} missing: install 'ray[serve]'")
        environment = {key: value for key, value in os.environ.items() if key not in FLAGS}
        environment |= FLAGS if optimised else {}
        arguments = (*names(shape, dtype), *(["batched"] if batched else []))
        self._helper = Helper(f"{__package__}.ray_serve_host", *arguments, environment=environment)
        said = self._helper.said
        self._address, self._protocol = said[protocol], protocol
        kind = f"{'optimised' if optimised else 'default'}{', batched' if batched else ''}"
        self.version = f"{said['version']}, Serve {kind}, over {protocol}"
        self._ask: Callable[[bytes], Awaitable[bytes]] | None = None
        warnings.filterwarnings("ignore", message="The given buffer is not writable")

    async def call(self, x_TD: Tensor) -> Tensor:
        if self._ask is None:  # here, on the event loop
            self._ask = _over_grpc(self._address) if self._protocol == "grpc" else _Http(self._address)
        answer = await self._ask(x_TD.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(answer, dtype=x_TD.dtype).view(x_TD.shape)

    def close(self) -> None:
        self._helper.close()


def _over_grpc(address: str) -> Callable[[bytes], Awaitable[bytes]]:
    wrappers = importlib.import_module("google.protobuf.wrappers_pb2")
    method = grpc.aio.insecure_channel(address, options=OPTIONS).unary_unary(
        METHOD,
        request_serializer=lambda payload: wrappers.BytesValue(value=payload).SerializeToString(),
        response_deserializer=lambda answer: wrappers.BytesValue.FromString(answer).value,
    )
    return method  # type: ignore[no-any-return]


class _Http:
    """HTTP/1.1 with connections that stay open: as many as there are calls at once. Answers must say their length."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, payload: bytes) -> bytes:
        while self._idle and self._idle[-1][0].at_eof():
            self._idle.pop()[1].close()
        opened = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port, limit=2**24)
        reader, writer = opened
        writer.write(b"POST / HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n\r\n" % (self._host.encode(), len(payload)))
        writer.write(payload)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        answer = await reader.readexactly(int(fields[b"content-length"]))
        self._idle.append(opened)
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"Serve answered {head!r} {answer[:200]!r}")
        return answer
