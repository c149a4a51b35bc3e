"""What the owner has told its controller: revision by revision, so that one that restarts is told the same again."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...router.mixture.layer import Layer
from ..control.messages import Desired
from ..runtime.backend import Backend
from .topology import Topology


class Declaring:
    """Tells a controller what is declared. `settings` are those of the cluster, as plain JSON."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.topology = Topology()
        self.layers: Mapping[str, Layer] = {}
        self._desired = Desired(owner=uuid.uuid4().hex, settings=settings)

    def declare(
        self,
        backend: Backend,
        layers: Mapping[str, Layer],
        timeout: float,
        redeclare: frozenset[str] = frozenset(),
        *,
        renewed: frozenset[str] = frozenset(),
        unverified: bool = True,
        removed: frozenset[str] = frozenset(),
        adopts: Mapping[str, str] = MappingProxyType({}),
        versions: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, str]:
        """Declare these layers, run by the present topology; returns the versions that then serve."""
        self.layers = layers
        revision = self._desired.revision + 1
        self._desired = replace(
            self._desired,
            revision=revision,
            declaration=revision,
            layers=layers,
            redeclare=redeclare,
            renewed=renewed,
            unverified=unverified,
            removed=removed,
            adopts=adopts,
            versions=versions,
            resumed=self._desired.resumed - redeclare,
            routers=backend.routers(),
        )
        self._run_by(backend, self.topology)
        try:
            serving = backend.declare(self._desired, timeout)
            # a file that is edited, or gone, changes nothing by itself
            self.resume(frozenset(id for layer in layers.values() for id in (*layer.everyone_by_id, *layer.own_ids)))
            return serving
        finally:  # a controller that restarts later is told what is declared, not to build it once more
            self._desired = replace(self._desired, renewed=frozenset(), unverified=True)

    def resume(self, ids: frozenset[str]) -> None:
        """Declare these ids from now on by what the registry says of them."""
        self._desired = replace(self._desired, resumed=self._desired.resumed | ids)

    def scale(self, backend: Backend, topology: Topology, timeout: float) -> None:
        """Have the controller take another topology; nothing else of what is declared changes."""
        self._desired = replace(self._desired, revision=self._desired.revision + 1)
        self._run_by(backend, topology)
        backend.declare(self._desired, timeout)

    def repeat(self, backend: Backend, revision: int, timeout: float) -> None:
        """Tell a controller that knows another revision once more what is declared."""
        if revision < self._desired.revision:
            backend.declare(self._desired, timeout)

    def _run_by(self, backend: Backend, topology: Topology) -> None:
        self.topology = topology
        self._desired = replace(
            self._desired,
            replicas=topology.experts,
            handles=backend.handles(),
            needs=topology.needs,
            scaled=topology.scaled,
            draining=topology.draining,
        )
