"""Whether the nodes of a cluster can hold its replicas, told with the expert, what it asks for and what is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from .plan import PlannedReplica

Resources = Mapping[str, float]
"""Amounts by Ray's names: "CPU", "GPU", and whatever a node was given besides."""

_SETTINGS = {"CPU": "num_cpus", "GPU": "num_gpus"}
_CURES = {
    "CPU": "lower num_cpus (0 reserves nothing), or add a node",
    "GPU": "to run it on CPU, leave num_gpus out or set it to 0",
}
_TINY = 1e-9


def needs(planned: PlannedReplica) -> Resources:
    """What the actor of a replica reserves, without what it leaves at 0."""
    expert = planned.placement
    asked = {"CPU": expert.num_cpus or 0.0, "GPU": expert.num_gpus, **expert.resources}
    return {name: amount for name, amount in asked.items() if amount}


def lacking(needed: Resources, nodes: Sequence[Resources]) -> str:
    """What an actor reserves, if no node has it all; else empty."""
    return "" if any(_fits(needed, node) for node in nodes) else _shown(needed)


def unplaceable(planned: Sequence[PlannedReplica], nodes: Sequence[Resources] | None) -> str:
    """Why these replicas cannot all run on nodes of these sizes; empty if nothing speaks against it.

    None for `nodes` is a single process, which reserves nothing and pins no GPU.

    Each replica has to fit on one node, and all of them together into the sum of the nodes. That is necessary and not
    sufficient: what has room in the sum may still not fit beside each other.
    """
    if nodes is None:
        nodes = [{name: math.inf for replica in planned for name in needs(replica) if name != "GPU"}]
    total: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for node in nodes:
        there.update(node)
    for replica in planned:
        needed = needs(replica)
        if asked := lacking(needed, nodes):
            return f"{replica.id} asks for {asked}, and no node has that: {_most(needed, nodes)}"
        total.update(needed)
    for name, amount in total.items():
        if amount > there[name] + _TINY:
            what = f"together the replicas ask for {_one(name, amount)}, and all nodes have {there[name]:g}"
            return f"{what}: {_cure(name)}"
    return ""


def _fits(needed: Resources, node: Resources) -> bool:
    return all(node.get(name, 0.0) + _TINY >= amount for name, amount in needed.items())


def _most(needed: Resources, nodes: Sequence[Resources]) -> str:
    """The most that a node has of the first thing that none has enough of, and what to do about it."""
    for name, amount in needed.items():
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if most + _TINY < amount:
            return f"the most is {_one(name, most)}: {_cure(name)}"
    return "each is there, but not on the same node"


def _cure(name: str) -> str:
    given = f"start a node with it (ray start --resources='{{\"{name}\": 1}}'), or take it out of the declaration"
    return _CURES.get(name, given)


def _shown(needed: Resources) -> str:
    return ", ".join(_one(name, amount) for name, amount in needed.items())


def _one(name: str, amount: float) -> str:
    return f"{_SETTINGS.get(name, name)}={amount:g}"
