"""Which replicas a layer needs: one actor for each copy of an expert, or of a pack of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...experts.errors import ConfigError
from ...experts.spec import Expert

if TYPE_CHECKING:  # importing Layer would import torch
    from ...router.mixture.layer import Layer


@dataclass(frozen=True)
class PlannedReplica:
    """A planned actor: its id, and its experts by id."""

    id: str
    experts: Mapping[str, Expert]

    @property
    def placement(self) -> Expert:
        """The expert whose resources decide where the actor runs; equal for all experts of a pack."""
        return next(iter(self.experts.values()))

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """The ids of this replica's experts."""
        return tuple(self.experts)


def plan_layer(layer: Layer) -> tuple[PlannedReplica, ...]:
    """The replicas of a layer, with ids such as `layer/expert#0` or `layer/pack#0`.

    Raises ConfigError if the experts of a pack have different resources or replicas.
    """
    groups: dict[str, dict[str, Expert]] = {}
    for name, expert in layer.everyone.items():
        if expert.pack in layer.everyone:
            raise ConfigError(f"layer {layer.name}: pack {expert.pack!r} has the name of an expert: choose another")
        groups.setdefault(f"{layer.name}/{expert.pack or name}", {})[f"{layer.name}/{name}"] = expert
    planned = []
    for group, experts in groups.items():
        first = next(iter(experts.values()))
        if any(expert.placement() != first.placement() for expert in experts.values()):
            raise ConfigError(
                f"{group}: experts of one pack share an actor, so their resources, replicas and autoscale must agree"
            )
        planned += [PlannedReplica(f"{group}#{copy}", experts) for copy in range(first.replicas)]
    return tuple(planned)
