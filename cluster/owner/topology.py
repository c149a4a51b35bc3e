"""How many replicas each expert or pack has, as declared or as it was scaled, and how that changes while they serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...experts.errors import ConfigError, ExpertMeshError, InvalidRequest, NotFound
from ...router.mixture.layer import Layer
from ..placement.capacity import Resources, needs, unplaceable
from ..placement.plan import PlannedReplica, group_of, groups_of, plan_layer
from ..runtime.backend import Backend

UNDO_SECONDS = 10.0
"""How long the controller is asked to go back to what was before a change that failed; it is told again later."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The replicas by id, and which of them are draining. `scaled` are the numbers by group that were asked for."""

    planned: Mapping[str, PlannedReplica] = field(default_factory=dict)
    scaled: Mapping[str, int] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()

    @property
    def experts(self) -> dict[str, tuple[str, ...]]:
        """The ids of the experts of each replica."""
        return {id: replica.expert_ids for id, replica in self.planned.items()}

    @property
    def needs(self) -> dict[str, Resources]:
        """What each replica reserves."""
        return {id: needs(replica) for id, replica in self.planned.items()}

    def numbers(self) -> dict[str, int]:
        """How many replicas each group has."""
        groups = [group_of(id) for id in self.planned]
        return {group: groups.count(group) for group in dict.fromkeys(groups)}


def topology_of(layers: Iterable[Layer], scaled: Mapping[str, int]) -> Topology:
    """What is declared, with other numbers where it was scaled. Raises ConfigError for a pack that does not agree."""
    planned = [replica for layer in layers for replica in plan_layer(layer, scaled)]
    return Topology(planned={replica.id: replica for replica in planned}, scaled=scaled)


def together(before: Topology, after: Topology) -> Topology:
    """All replicas of two topologies, each with the experts that it has in either; the numbers are those of `after`."""
    planned = {**before.planned, **after.planned}
    for id in before.planned.keys() & after.planned.keys():
        experts = {**before.planned[id].experts, **after.planned[id].experts}
        planned[id] = replace(after.planned[id], experts=experts)
    return Topology(planned=planned, scaled=after.scaled)


def resumed_numbers(
    layers: Iterable[Layer], kept: Mapping[str, int], redeclare: Collection[str]
) -> tuple[dict[str, int], list[str]]:
    """The numbers of replicas that outlive a restart, by group, and a line about each that is not the declared one.

    `redeclare` are the ids of experts and packs that follow their declaration. What is not declared is kept, too.
    """
    scaled, lines = dict(kept), []
    for layer in layers:
        for group, experts in groups_of(layer).items():
            declared = next(iter(experts.values())).replicas
            if {group, *experts} & set(redeclare):
                scaled.pop(group, None)
            elif scaled.get(group, declared) != declared:
                has = f"{group} has {_replicas(scaled[group])}, as it was scaled"
                lines.append(f"{has}; redeclare {group} to have the {declared} of its declaration")
    return scaled, lines


def by_group(layers: Iterable[Layer], asked: Mapping[str, int]) -> dict[str, int]:
    """The numbers asked for, by group: an expert of a pack stands for the pack.

    Raises NotFound, and InvalidRequest for two numbers for one pack.
    """
    groups = {group: group for layer in layers for group in groups_of(layer)}
    known = {id: group for layer in layers for group, experts in groups_of(layer).items() for id in experts} | groups
    wanted: dict[str, int] = {}
    for id, number in asked.items():
        if id not in known:
            raise NotFound(f"there is no expert or pack {id!r}; known are {', '.join(sorted(known)[:20])}")
        if wanted.setdefault(known[id], number) != number:
            raise InvalidRequest(f"{id}: {known[id]} is one pack, and was given two numbers of replicas")
    return wanted


def wait_for(
    backend: Backend, planned: Collection[PlannedReplica], deadline: float, say: Callable[[str], None]
) -> None:
    """Wait until these replicas run. Raises the error of the first that does not, with what may be the reason."""
    for number, replica in enumerate(planned, start=1):
        try:
            report = backend.wait_replica(replica.id, deadline)
        except ExpertMeshError as error:
            reason = unplaceable([*planned], backend.nodes()) or error.message
            raise type(error)(f"{replica.id} is not running: {reason}") from error
        say(f"replica {number}/{len(planned)} is running: {replica.id} on {report.node}, {report.device}")


class Scaling:
    """Brings a running cluster from one topology to another, by starting and ending replicas.

    `start` starts a replica, `send` has the controller take a topology within some seconds: it then holds all that it
    has to, what drains is not used any more, and its numbers are durable.
    """

    def __init__(
        self, backend: Backend, start: Callable[[PlannedReplica], None], send: Callable[[Topology, float], object]
    ) -> None:
        self._backend = backend
        self._start = start
        self._send = send

    def change(self, before: Topology, after: Topology, timeout: float) -> None:
        """Start what is new, then drain and end what is not wanted any more.

        Raises ConfigError where it cannot be placed, and Unavailable where it was not ready in time or the controller
        does not answer; then everything is as before.
        """
        deadline = time.monotonic() + timeout
        new = [replica for id, replica in after.planned.items() if id not in before.planned]
        gone = frozenset(before.planned.keys() - after.planned.keys())
        both = replace(before, planned={**before.planned, **after.planned})
        if problem := unplaceable([*both.planned.values()], self._backend.nodes()):
            raise ConfigError(problem)
        try:
            for replica in new:
                self._start(replica)
            wait_for(self._backend, new, deadline, log.info)
            if new:
                self._send(both, _left(deadline))
            self._send(replace(both, scaled=after.scaled, draining=gone), _left(deadline))
        except BaseException:
            self._tell(before, UNDO_SECONDS)
            self._stop(replica.id for replica in new)
            raise
        if gone:
            self._tell(after, _left(deadline))
            self._stop(gone)

    def _tell(self, topology: Topology, timeout: float) -> None:
        """Send a topology that is decided; a controller that does not answer is told it when it does."""
        try:
            self._send(topology, timeout)
        except ExpertMeshError as error:
            log.warning("the controller was not told yet how many replicas there are: %s", error)

    def _stop(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._backend.stop_replica(id)


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _replicas(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"
