"""Calls between actors through Ray, and the one place that translates Ray's errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from torch import Tensor

from ...experts.errors import ConfigError, ExpertMeshError, Unavailable
from ...experts.staging.stage import Receipt
from ...experts.tensors import byte_view
from ...experts.weights.files import load_tensors, torch_name
from ...router.fanout.replica_view import Replica
from ..config.layer_changes import LayersRequest
from ..control.messages import (
    Candidate,
    Desired,
    RouterReport,
    RouterUpdate,
    ScaleRequest,
    SwapRequest,
    SwapResult,
    proposal_of,
)
from ..control.orders import Order
from ..machine.process_tuning import background
from ..placement.capacity import Resources, lacking

FILES_KEPT = 4
ANSWER_SECONDS = 10.0
SWAP_GRACE = 60.0
"""How long after the time for staging a swap may take to commit and to be adopted."""
T = TypeVar("T")
Packed = tuple[np.ndarray[Any, Any], str, tuple[int, ...]]
"""A tensor in a form that Ray sends without a copy: bytes, name of the dtype, shape."""


class RayRouterPort:
    """Calls the routers' actors."""

    controller: Any = None

    async def declare(self, router: str, handle: Any, desired: Desired) -> None:
        """Send the declared layers."""
        layers = {name: layer.without_live_objects() for name, layer in desired.layers.items()}
        await awaited(handle.declare.remote(self.controller, replace(desired, layers=layers)))

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        """Send an update; returns the router's report."""
        return await awaited(handle.sync.remote(order, update))

    async def stage(self, order: Order, router: str, handle: Any, candidate: Candidate) -> Receipt:
        """Stage a gate."""
        return await awaited(handle.stage.remote(order, candidate))

    async def unload(self, order: Order, router: str, handle: Any, id: str, version: str) -> None:
        """Unload a gate."""
        await awaited(handle.unload.remote(order, id, version))


class RayReplicaPort:
    """Calls the replicas. Weights go through Ray's object store: once to each node, for all its replicas."""

    def __init__(self) -> None:
        self._weights: dict[Any, Any] = {}
        self._storing = threading.Lock()
        self._background = background("weights")

    async def probe(self, order: Order, replica_id: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
        """Request a report."""
        return await awaited(_actor(replica_id, handle).report.remote(order, given_up))

    async def waits_for(self, needs: Mapping[str, float]) -> str:
        """What a replica that is down waits for, if no node has what it reserves; else empty."""
        missing = await asyncio.to_thread(lambda: lacking(needs, nodes()))
        return f"it waits for a node with {missing}" if missing else ""

    async def stage(self, order: Order, replica_id: str, handle: Any, candidate: Candidate) -> Receipt:
        """Stage an expert."""
        weights = None
        if candidate.weights is not None:
            loop = asyncio.get_running_loop()
            weights = await loop.run_in_executor(self._background, self._stored, candidate.weights)
        call = _actor(replica_id, handle).stage.remote(
            order, proposal_of(candidate), candidate.replaces, candidate.mode, weights
        )
        return await awaited(call)

    async def unload(self, order: Order, replica_id: str, handle: Any, id: str, version: str) -> None:
        """Unload a version."""
        await awaited(_actor(replica_id, handle).unload.remote(order, id, version))

    def _stored(self, path: Path) -> Any:
        """Put the tensors of a file into the object store; the last few files are kept for the next replicas.

        Thread-safe: the candidates of one swap are staged concurrently.
        """
        status = path.stat()
        key = (path, status.st_ino, status.st_mtime_ns)
        with self._storing:
            stored = self._weights.pop(key, None)
            if stored is None:
                tensors = load_tensors(path)[0]
                stored = ray.put({name: pack(tensor) for name, tensor in tensors.items()})
            self._weights[key] = stored
            if len(self._weights) > FILES_KEPT:
                del self._weights[next(iter(self._weights))]
        return stored


class RayControlPort:
    """Calls the controller, for the gateway. What has no answer in time raises Unavailable."""

    handle: Any = None

    async def swap(self, request: SwapRequest) -> SwapResult:
        """Carry out a swap."""
        return await awaited(self._actor().swap.remote(request), request.timeout + SWAP_GRACE)

    async def change(self, request: ScaleRequest | LayersRequest) -> dict[str, Any]:
        """Have the owner change numbers of replicas, or layers."""
        return await awaited(self._actor().change.remote(request), request.timeout + SWAP_GRACE)

    async def progress(self, swap_id: str) -> dict[str, Any]:
        """The progress of a swap."""
        return await awaited(self._actor().progress.remote(swap_id), ANSWER_SECONDS)

    async def history(self, id: str) -> list[dict[str, Any]]:
        """The kept versions of an id."""
        return await awaited(self._actor().history.remote(id), ANSWER_SECONDS)

    async def declared(self) -> dict[str, Any]:
        """The document of what is declared."""
        return await awaited(self._actor().declared.remote(), ANSWER_SECONDS)

    async def recall(self, epoch: int, ttl: float) -> None:
        """Load a kept epoch."""
        await awaited(self._actor().recall.remote(epoch, ttl), ttl + ANSWER_SECONDS)

    async def problem(self) -> str:
        """Why the controller does not work; empty if it does."""
        return await awaited(self._actor().problem.remote(), ANSWER_SECONDS)

    def _actor(self) -> Any:
        if self.handle is None:
            raise Unavailable("the controller has not started yet; retry in a moment")
        return self.handle


async def awaited(reference: Awaitable[T], timeout: float | None = None) -> T:
    """Await a Ray reference, at most `timeout` seconds, and translate Ray's exceptions.

    Without a timeout whoever calls has one: the executor for each of its orders, the controller for probes and updates.
    """
    try:
        return await asyncio.wait_for(_result(reference), timeout)
    except RayError as error:
        raise translated(error) from error
    except (asyncio.TimeoutError, TimeoutError):
        raise Unavailable("the controller did not answer in time; it may be starting or busy") from None


async def _result(reference: Awaitable[T]) -> T:
    return await reference


def fetched(reference: Any, timeout: float) -> Any:
    """Like `awaited`, but blocking, for at most `timeout` seconds."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayError as error:
        raise translated(error) from error


def translated(error: RayError) -> ExpertMeshError:
    """The expertmesh error for a Ray exception."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, ExpertMeshError) else ExpertMeshError(f"an actor raised: {cause!r}")
    if isinstance(error, GetTimeoutError):
        return Unavailable("an actor did not answer in time; it may be starting or busy")
    if isinstance(error, RuntimeEnvSetupError):
        return ConfigError(f"its runtime_env could not be set up: {last_lines(str(error))}")
    if isinstance(error, RayActorError):
        return Unavailable("the actor died or is restarting; retry")
    return Unavailable(f"Ray could not carry the call ({type(error).__name__}); retry")


def actor_ended(error: ExpertMeshError) -> bool:
    """Whether a call failed because its actor's process ended; perhaps before the call reached it, Ray does not say."""
    return isinstance(error.__cause__, RayActorError)


def nodes() -> list[Resources]:
    """What each node of the Ray cluster has to reserve."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def pack(tensor: Tensor) -> Packed:
    """Pack a tensor into a form that Ray sends without a copy."""
    return np.frombuffer(byte_view(tensor), np.uint8), torch_name(tensor.dtype), tuple(tensor.shape)


def _actor(replica_id: str, handle: Any) -> Any:
    if handle is None:
        raise Unavailable(f"replica {replica_id} has no actor yet")
    return handle


def last_lines(text: str, most: int = 400) -> str:
    """The end of what a tool printed: there it says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines)[-most:]
