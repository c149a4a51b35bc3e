"""Replacing an expert under traffic by restarting its replicas one after the other, without mixing two versions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..experts.errors import ConfigError, Unavailable
from ..router.epochs import Epoch
from ..router.layer import Layer
from ..router.replicas import READY, Replica
from .backend import Backend
from .controller import Desired, RouterReport
from .plan import PlannedReplica

POLL_SECONDS = 0.05


class RollingReplacement:
    """Drain a replica, start the new version in its place, make that the current epoch, then do the next.

    A request keeps the epoch that it began with, so the last replica of the old version is drained only when no
    request pins an older epoch. A lone replica is not drained before its successor serves.
    """

    def __init__(
        self, backend: Backend, publish: Callable[..., None], desired: Callable[[], Desired], timeout: float
    ) -> None:
        self._backend = backend
        self._publish = publish
        self._desired = desired
        self._deadline = time.monotonic() + timeout

    def run(
        self,
        expert_id: str,
        layer: Layer,
        before: Iterable[PlannedReplica],
        after: Iterable[PlannedReplica],
    ) -> str:
        """Replace what runs `expert_id`, given the plans of its layer; returns the new version."""
        old = {planned.id: planned for planned in before if expert_id in planned.experts}
        new = [planned for planned in after if expert_id in planned.experts]
        running = [name for name, experts in self._desired().replicas.items() if expert_id in experts]
        if len(running) == 1:
            return self._beside(running[0], new[0], expert_id, layer)
        version = ""
        for name, planned in zip(running, new, strict=True):
            self._drain(name)
            self._backend.stop_replica(name)
            report = self._start(planned, otherwise=old[name])
            version = version or self._flip(report, expert_id, layer)
        return version

    def _beside(self, name: str, planned: PlannedReplica, expert_id: str, layer: Layer) -> str:
        group, _, copy = name.rpartition("#")
        successor = replace(planned, id=f"{group}#{int(copy) + 1}")
        report = self._start(successor, otherwise=None)
        version = self._flip(report, expert_id, layer)
        self._drain(name)
        self._backend.stop_replica(name)
        self._without(name)
        return version

    def _start(self, planned: PlannedReplica, otherwise: PlannedReplica | None) -> Replica:
        """Start a replica and let the router know it; if it cannot load, start what was there before."""
        try:
            report = self._started(planned)
        except BaseException:
            self._backend.stop_replica(planned.id)
            if otherwise is not None:
                self._started(otherwise)
            raise
        return report

    def _started(self, planned: PlannedReplica) -> Replica:
        self._backend.start_replica(planned)
        report = self._backend.wait_replica(planned.id, self._deadline)
        if report.state != READY:
            raise ConfigError(f"replica {planned.id} could not load its experts: {report.problem}")
        desired = self._desired()
        replicas = {**desired.replicas, planned.id: planned.expert_ids}
        self._publish(replicas=replicas, draining=desired.draining - {planned.id})
        return report

    def _flip(self, report: Replica, expert_id: str, layer: Layer) -> str:
        epoch = self._desired().epoch
        versions = {**epoch.versions, **dict(report.holds)}
        layers = {**epoch.layers, layer.name: layer.without_live_objects()}
        self._publish(epoch=Epoch(epoch.number + 1, versions, layers))
        self._until(lambda report: report.oldest_pinned >= epoch.number + 1, "requests on the old version to end")
        return versions[expert_id]

    def _drain(self, name: str) -> None:
        self._publish(draining=self._desired().draining | {name})
        self._until(lambda report: not report.rows_in_flight.get(name, 0), f"rows under way to {name} to come back")

    def _without(self, name: str) -> None:
        desired = self._desired()
        replicas = {known: experts for known, experts in desired.replicas.items() if known != name}
        self._publish(replicas=replicas, draining=desired.draining - {name})

    def _until(self, done: Callable[[RouterReport], bool], what: str) -> None:
        while True:
            self._backend.apply(self._desired())
            report = self._backend.state()[2]
            if report is not None and done(report):
                return
            if time.monotonic() > self._deadline:
                raise Unavailable(f"gave up waiting for {what}")
            time.sleep(POLL_SECONDS)


def common_versions(reports: Iterable[Replica]) -> dict[str, str]:
    """The version of every expert, as its replicas report it.

    Raises ConfigError when replicas of one expert differ: then their code or random numbers differ between nodes.
    """
    versions: dict[str, str] = {}
    for report in reports:
        for expert, version in report.holds:
            if versions.setdefault(expert, version) != version:
                raise ConfigError(
                    f"the replicas of {expert} do not agree on its version ({version}, {versions[expert]}): its code "
                    "or its random initial weights differ between nodes; give it weights, and the same packages"
                )
    return versions
