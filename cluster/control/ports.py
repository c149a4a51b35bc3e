"""How controller, router and replicas reach each other. Ray implements these ports, and so does one process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...experts.staging.stage import Receipt
from ...router.fanout.replica_view import Replica
from ..config.layer_changes import LayersRequest
from .messages import Candidate, Desired, RouterReport, RouterUpdate, ScaleRequest, SwapRequest, SwapResult
from .orders import Order


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """Where the durable state of a cluster is, and how many epochs before the current one are kept."""

    state_dir: str
    retain_epochs: int


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """What the owner asks its controller about: the revision that it serves, the replicas, the current versions.

    `routers` are the facts of every router by name, each with its "state".

    `kept` are versions that were swapped in and serve on although their declaration was edited. `broken` are the ids
    whose current version cannot be loaded, and why. `resumed` is the epoch that the registry had when it was opened, or
    0; `swapped` are the versions that were swapped in before the last declaration, `edited` the ids that it replaced.
    `asked` are the numbers of replicas that the load asks for, by expert or pack, each with the id of the decision.
    `used` are the ids that a request may still need: of the current epoch, and of those that are pinned. `current` are
    the versions of the current epoch, also of what is not declared.
    """

    revision: int
    epoch: int
    versions: Mapping[str, str]
    replicas: tuple[Replica, ...]
    kept: Mapping[str, str]
    broken: Mapping[str, str]
    resumed: int = 0
    swapped: Mapping[str, str] = field(default_factory=dict)
    edited: Collection[str] = ()
    used: frozenset[str] = frozenset()
    current: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    routers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class RouterPort(Protocol):
    """How the controller reaches the router. Every order raises Fenced where another controller has given one since."""

    async def declare(self, router: str, handle: Any, desired: Desired) -> None:
        """Say that more was declared, and hand over how replicas are reached; layers come as versions."""

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        """Hand over what is known; answers with what the router knows."""

    async def stage(self, order: Order, router: str, handle: Any, candidate: Candidate) -> Receipt:
        """Have a gate, or a layer, staged and verified."""

    async def unload(self, order: Order, router: str, handle: Any, id: str, version: str) -> None:
        """Have a gate, or a layer, forgotten."""


class ReplicaPort(Protocol):
    """How the controller reaches the replicas; an order raises Fenced as those to routers do."""

    async def probe(self, order: Order, replica_id: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
        """Ask a replica for a report. Raises Unavailable when it is not there.

        Once it has answered, it answers the routers no more that are `given_up`: by name, a session of theirs, or ""
        where none is known.
        """

    async def waits_for(self, needs: Mapping[str, float]) -> str:
        """What a replica that is down waits for, if no node has what it reserves; else empty."""

    async def stage(self, order: Order, replica_id: str, handle: Any, candidate: Candidate) -> Receipt:
        """Have an expert staged and verified beside what the replica serves."""

    async def unload(self, order: Order, replica_id: str, handle: Any, id: str, version: str) -> None:
        """Have a version forgotten."""


class ControlPort(Protocol):
    """How a router reaches the controller."""

    async def swap(self, request: SwapRequest) -> SwapResult:
        """Carry out a swap."""

    async def change(self, request: ScaleRequest | LayersRequest) -> dict[str, Any]:
        """Have the owner change numbers of replicas, or layers."""

    async def progress(self, swap_id: str) -> dict[str, Any]:
        """How far a swap is."""

    async def history(self, id: str) -> list[dict[str, Any]]:
        """The versions of an id that are kept."""

    async def declared(self) -> dict[str, Any]:
        """The document of what is declared."""

    async def recall(self, epoch: int, ttl: float) -> None:
        """Load an epoch that is kept."""

    async def problem(self) -> str:
        """Why the controller does not work; empty if it does."""
