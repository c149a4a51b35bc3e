"""Which replicas a layer needs: one actor for each copy of an expert, or of a pack of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..experts.errors import ConfigError
from ..experts.spec import Expert
from ..router.layer import Layer


@dataclass(frozen=True)
class PlannedReplica:
    """One actor to be: its id, and what it is to load, {expert id: (expert, version counter)}."""

    id: str
    experts: Mapping[str, tuple[Expert, int]]

    @property
    def placement(self) -> Expert:
        """The expert whose resources decide where the actor runs; all of a pack agree."""
        return next(iter(self.experts.values()))[0]

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """The experts of this replica."""
        return tuple(self.experts)


def plan_layer(layer: Layer, counters: Mapping[str, int]) -> tuple[PlannedReplica, ...]:
    """The replicas of a layer, called `layer/expert#0` or `layer/pack#0` and so on.

    Raises ConfigError where the experts of a pack ask for different resources.
    """
    groups: dict[str, dict[str, tuple[Expert, int]]] = {}
    for name, expert in layer.everyone.items():
        expert_id = f"{layer.name}/{name}"
        group = f"{layer.name}/{expert.pack or name}"
        if expert.pack in layer.everyone:
            raise ConfigError(f"layer {layer.name}: pack {expert.pack!r} has the name of an expert; choose another")
        groups.setdefault(group, {})[expert_id] = (expert, counters.get(expert_id, 1))
    planned = []
    for group, experts in groups.items():
        first = next(iter(experts.values()))[0]
        if any(expert.placement() != first.placement() for expert, _ in experts.values()):
            raise ConfigError(
                f"{group}: experts of one pack share an actor, so their resources and replicas must agree"
            )
        planned += [PlannedReplica(f"{group}#{copy}", experts) for copy in range(first.replicas)]
    return tuple(planned)
