"""Which replicas a layer needs: one actor for each copy of an expert, or of a pack of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ...experts.errors import ConfigError
from ...experts.spec import Expert

if TYPE_CHECKING:  # importing Layer would import torch
    from ...router.mixture.layer import Layer

_AS_DECLARED: Mapping[str, int] = MappingProxyType({})


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


def plan_layer(layer: Layer, counts: Mapping[str, int] = _AS_DECLARED) -> tuple[PlannedReplica, ...]:
    """The replicas of a layer, with ids such as `layer/expert#0` or `layer/pack#0`.

    `counts` are the numbers of replicas of groups, such as `layer/expert`, that have others than declared. Raises
    ConfigError if the experts of a pack have different resources or replicas.
    """
    planned = []
    for group, experts in groups_of(layer).items():
        first = next(iter(experts.values()))
        if any(expert.placement() != first.placement() for expert in experts.values()):
            raise ConfigError(
                f"{group}: experts of one pack share an actor, so their resources, replicas and autoscale must agree"
            )
        copies = counts.get(group, first.replicas)
        planned += [PlannedReplica(f"{group}#{copy}", experts) for copy in range(copies)]
    return tuple(planned)


def groups_of(layer: Layer) -> dict[str, dict[str, Expert]]:
    """What has replicas of its own, `layer/expert` or `layer/pack`, with its experts by id.

    Raises ConfigError for a pack that has the name of an expert.
    """
    groups: dict[str, dict[str, Expert]] = {}
    for name, expert in layer.everyone.items():
        if expert.pack in layer.everyone:
            raise ConfigError(f"layer {layer.name}: pack {expert.pack!r} has the name of an expert: choose another")
        groups.setdefault(f"{layer.name}/{expert.pack or name}", {})[f"{layer.name}/{name}"] = expert
    return groups


def group_of(replica_id: str) -> str:
    """The group of a replica: `news/e3` of `news/e3#2`."""
    return replica_id.rpartition("#")[0]
