"""How many replicas each expert or pack should have, by how long its rows wait and how busy its replicas are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...experts.spec import Autoscale

CALM = 0.5
"""The share of the target up to which rows may wait where a replica is ended."""

MOST_BUSY = 0.75
"""How busy the replicas that remain may be, at most, where one is ended."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load of a group, an expert or a pack, over the last seconds.

    `queue_ms` is the time in milliseconds that a row waits before it is computed, and `busy` the number of replicas
    that compute, both on average. Of the `wanted` replicas some are `ready`.
    """

    queue_ms: float
    busy: float
    ready: int
    wanted: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Another number of replicas for a group, and why."""

    group: str
    before: int
    wanted: int
    reason: str

    def __str__(self) -> str:
        return f"{self.group} from {self.before} to {self.wanted} replicas: {self.reason}"


class Autoscaler:
    """Decides, tick by tick, how many replicas each group should have.

    It never decides while a change is under way, which is where `ready` differs from `wanted`, and goes by what is
    wanted in truth: a decision that could not be carried out is made again after as long a time.
    """

    def __init__(self) -> None:
        self._above: dict[str, float] = {}
        self._below: dict[str, float] = {}

    def tick(self, now: float, rules: Mapping[str, Autoscale], loads: Mapping[str, Load]) -> list[Decision]:
        """The changes at a time in seconds, by group; groups without a rule or a load are left alone."""
        groups = sorted(rules.keys() & loads.keys())
        for since in (self._above, self._below):
            for gone in since.keys() - set(groups):
                del since[gone]
        decided = (self._decide(now, group, rules[group], loads[group]) for group in groups)
        return [decision for decision in decided if decision is not None]

    def _decide(self, now: float, group: str, rule: Autoscale, load: Load) -> Decision | None:
        within = min(max(load.wanted, rule.min), rule.max)
        if within != load.wanted:
            return self._change(group, load, within, f"autoscale allows {rule.min} to {rule.max}")
        settled = load.ready == load.wanted
        above = _lasts(self._above, group, now, settled and load.queue_ms > rule.target_queue_ms)
        below = _lasts(self._below, group, now, settled and _can_spare_one(rule, load))
        if above is not None and above >= rule.up_after and load.wanted < rule.max:
            target = f"more than {rule.target_queue_ms:g} ms"
            why = f"for {above:.0f} s rows have waited {target}, now {load.queue_ms:.0f} ms"
            return self._change(group, load, min(rule.max, _more(rule, load)), why)
        if below is not None and below >= rule.down_after and load.wanted > rule.min:
            busy = f"{load.busy:.1f} of {load.ready} replicas are busy"
            why = f"for {below:.0f} s rows have waited little, now {load.queue_ms:.0f} ms, and {busy}"
            return self._change(group, load, load.wanted - 1, why)
        return None

    def _change(self, group: str, load: Load, wanted: int, reason: str) -> Decision:
        self._above.pop(group, None)
        self._below.pop(group, None)
        return Decision(group=group, before=load.wanted, wanted=wanted, reason=reason)


def _lasts(since: dict[str, float], group: str, now: float, holds: bool) -> float | None:
    """For how many seconds a condition has held; None where it does not."""
    if not holds:
        since.pop(group, None)
        return None
    return now - since.setdefault(group, now)


def _more(rule: Autoscale, load: Load) -> int:
    """More replicas in proportion to the excess, and at most twice as many."""
    excess = min(2.0, load.queue_ms / rule.target_queue_ms)
    return max(load.wanted + 1, math.ceil(load.wanted * excess))


def _can_spare_one(rule: Autoscale, load: Load) -> bool:
    """Whether rows would wait well below the target with one replica fewer.

    A queue is as long as the share of time that its server has left is short: waits grow as `busy / idle`. So one
    replica fewer, and as much work, multiplies them by `idle / (idle - 1)`.
    """
    idle = load.ready - load.busy
    if load.ready < 2 or idle - 1 < (1 - MOST_BUSY) * (load.ready - 1):
        return False
    return load.queue_ms * idle / (idle - 1) <= CALM * rule.target_queue_ms
