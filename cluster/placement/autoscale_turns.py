"""The turns of autoscaling: from what routers count, and replicas are, to decisions and what is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...experts.spec import Autoscale
from ...router.fanout.replica_view import READY, Replica
from ...router.fanout.telemetry import ReplicaLoad, Scaled
from .autoscale import Autoscaler, Decision, Load
from .load_meter import LoadMeter
from .plan import group_of, groups_of

if TYPE_CHECKING:  # importing Layer would import torch
    from ...router.mixture.layer import Layer

TICK_SECONDS = 1.0


class Autoscaling:
    """Measures and decides once a tick, by the `rules` of groups.

    `scaled` is what was decided of each group with a rule, so far. `asked` is the last decision of each group, as the
    number of the decision and that of its replicas.
    """

    def __init__(self) -> None:
        self.rules: Mapping[str, Autoscale] = {}
        self.scaled: dict[str, Scaled] = {}
        self.asked: dict[str, tuple[int, int]] = {}
        self._meter = LoadMeter()
        self._scaler = Autoscaler()
        self._next = 0.0
        self._decided = 0

    def reported(self, router: str, incarnation: str, loads: Mapping[str, ReplicaLoad]) -> None:
        """Take what a router has counted."""
        self._meter.reported(router, incarnation, loads)

    def left(self, router: str) -> None:
        """Forget a router that has left."""
        self._meter.left(router)

    def turn(self, now: float, wanted: Iterable[str], replicas: Iterable[Replica]) -> list[Decision]:
        """The decisions at a time in seconds; none before a tick is over.

        `wanted` are the ids of the replicas that are to be, and `replicas` what is known of them.
        """
        if now < self._next:
            return []
        self._next = now + TICK_SECONDS
        many = Counter(map(group_of, wanted))
        ready = Counter(group_of(replica.id) for replica in replicas if replica.state == READY)
        loads = {
            group: Load(queue_ms=queue_ms, busy=busy, ready=ready[group], wanted=many[group])
            for group, (queue_ms, busy) in self._meter.measure(now, self.rules).items()
            if many[group]
        }
        known, decisions = self.scaled, self._scaler.tick(now, self.rules, loads)
        self.scaled = {group: replace(known.get(group, Scaled()), wanted=many[group]) for group in self.rules}
        for decision in decisions:
            self._decided += 1
            self.asked[decision.group] = self._decided, decision.wanted
            self.scaled[decision.group] = self.scaled[decision.group].decided(decision.wanted, decision.reason)
        return decisions

    def asked_by(self, who: str) -> dict[str, tuple[str, int]]:
        """The last decision of each group: its id, which no other decision has, and its number of replicas."""
        return {group: (f"{who} {decision}", number) for group, (decision, number) in self.asked.items()}


def rules_of(layers: Iterable[Layer]) -> dict[str, Autoscale]:
    """The rule of each group that is scaled by its load; all experts of a pack have the same."""
    groups = [item for layer in layers for item in groups_of(layer).items()]
    rules = {group: next(iter(experts.values())).autoscale for group, experts in groups}
    return {group: rule for group, rule in rules.items() if rule is not None}
