"""The layer as a Ray Serve application: a router that gates and combines, and one deployment per expert.

Rows travel as numpy views of their bytes, and all experts are called before any is awaited. The router takes rows over
a handle (`layer`), over gRPC (`Call`) and over HTTP. With `batched` it merges requests that wait for it, by
`serve.batch`, as Serve's guide to performance advises.

Shapes: T rows, D features, R rows at an expert.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import grpc
import numpy as np
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from expertmesh.router.mixture.combine import combine
from expertmesh.router.mixture.dispatch import dispatch

from .model import Shape, expert, gate
from .ray_actors import Bytes, to_bytes, to_rows

SERVICE = "expertmesh.peers.Layer"
MANY = 1024
BATCH = 64


class ExpertDeployment:
    """One expert."""

    def __init__(self, shape: Shape, index: int, dtype: torch.dtype) -> None:
        _prepare()
        self._expert = expert(shape, index, dtype)
        self._width, self._dtype = shape.width, dtype

    async def forward(self, rows: Bytes) -> Bytes:
        """Its rows."""
        with torch.inference_mode():
            return to_bytes(self._expert(to_rows(rows, self._dtype, self._width)))


class RouterDeployment:
    """The layer, with handles to its experts."""

    def __init__(self, shape: Shape, dtype: torch.dtype, batched: bool, *experts: Any) -> None:
        _prepare()
        self._shape, self._dtype, self._batched = shape, dtype, batched
        self._gate = gate(shape)
        cheap = {"request_serialization": "pickle", "response_serialization": "pickle"}
        self._experts = [handle.options(method_name="forward", **cheap) for handle in experts]

    async def layer(self, rows: Bytes) -> Bytes:
        """Rows as bytes to rows as bytes."""
        x_TD = to_rows(rows, self._dtype, self._shape.width)
        return to_bytes(await self._merged(x_TD) if self._batched else await self._compute(x_TD))

    async def Call(self, request: BytesValue) -> BytesValue:
        """The same over gRPC."""
        answer = await self.layer(np.frombuffer(request.value, np.uint8))
        return BytesValue(value=answer.tobytes())

    async def __call__(self, request: Request) -> Response:
        """The same over HTTP."""
        answer = await self.layer(np.frombuffer(await request.body(), np.uint8))
        return Response(answer.tobytes(), media_type="application/octet-stream")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
    async def _merged(self, requests: list[Tensor]) -> list[Tensor]:
        y_TD = await self._compute(torch.cat(requests) if len(requests) > 1 else requests[0])
        return list(torch.split(y_TD, [x_TD.shape[0] for x_TD in requests]))

    async def _compute(self, x_TD: Tensor) -> Tensor:
        with torch.inference_mode():
            handle = dispatch(self._gate(x_TD), self._shape.experts)
            rows = to_bytes(x_TD.index_select(0, handle.rows_N)).reshape(handle.num_pairs, -1)
            parts = [rows[handle.pairs(index)] for index in range(self._shape.experts)]
        called = zip(self._experts, parts, strict=True)
        answers = await asyncio.gather(*[one.remote(part.reshape(-1)) for one, part in called if len(part)])
        with torch.inference_mode():
            parts_RD = [to_rows(answer, self._dtype, self._shape.width) for answer in answers]
            return combine(handle, torch.cat(parts_RD)).output


def application(shape: Shape, dtype: torch.dtype, batched: bool) -> Any:
    """The application, to be run by `serve.run`."""
    options = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": MANY}
    one: Any = serve.deployment(ExpertDeployment)
    experts = [one.options(name=f"expert-{i}", **options).bind(shape, i, dtype) for i in range(shape.experts)]
    router: Any = serve.deployment(RouterDeployment)
    return router.options(name="router", **options).bind(shape, dtype, batched, *experts)


def add_to_server(servicer: Any, server: Any) -> None:
    """What generated code does for a service with the one method `Call`: the gRPC ingress of Serve asks for this."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Call, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Call": handler}),))


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
