"""Which replicas a layer needs: one actor for each copy of an expert, or of a pack of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...experts.errors import ConfigError
from ...experts.spec import Expert

if TYPE_CHECKING:  # a layer has a gate, and that is torch's
    from ...router.mixture.layer import Layer


@dataclass(frozen=True)
class PlannedReplica:
    """One actor to be: its id, and the experts that it is for, by id."""

    id: str
    experts: Mapping[str, Expert]

    @property
    def placement(self) -> Expert:
        """The expert whose resources decide where the actor runs; all of a pack agree."""
        return next(iter(self.experts.values()))

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """The experts of this replica."""
        return tuple(self.experts)


def plan_layer(layer: Layer) -> tuple[PlannedReplica, ...]:
    """The replicas of a layer, called `layer/expert#0` or `layer/pack#0` and so on.

    Raises ConfigError where the experts of a pack ask for different resources.
    """
    groups: dict[str, dict[str, Expert]] = {}
    for name, expert in layer.everyone.items():
        if expert.pack in layer.everyone:
            raise ConfigError(f"layer {layer.name}: pack {expert.pack!r} has the name of an expert; choose another")
        groups.setdefault(f"{layer.name}/{expert.pack or name}", {})[f"{layer.name}/{name}"] = expert
    planned = []
    for group, experts in groups.items():
        first = next(iter(experts.values()))
        if any(expert.placement() != first.placement() for expert in experts.values()):
            raise ConfigError(
                f"{group}: experts of one pack share an actor, so their resources and replicas must agree"
            )
        planned += [PlannedReplica(f"{group}#{copy}", experts) for copy in range(first.replicas)]
    return tuple(planned)
