"""The steps of a plan that change layers, as what a client asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....experts.names import is_gate_id
from ...placement.change_plan import Change, Step

LAYER_STEPS = ("add_layer", "add_expert", "change_experts", "remove_expert", "remove_layer", "set", "autoscale")
"""The kinds of steps that are one edit of one layer."""

_LISTS = ("experts", "shared")


def layer_of(step: Step) -> str:
    """The layer that a step changes."""
    return step.subject.partition("/")[0]


def edit_of(step: Step) -> dict[str, Any]:
    """What becomes of the layer, without its gate, as `change_layers` takes it."""
    found = {(change.section, change.key): change for change in step.changes}
    if step.kind == "remove_layer":
        return {"kind": "remove"}
    edit: dict[str, Any] = {"kind": "add"} if step.kind == "add_layer" else {}
    rules = {key.partition("/")[2]: change.after for (section, key), change in found.items() if section == "autoscale"}
    if step.kind == "autoscale":
        return {"autoscale": rules}
    settings = _settings(found.get(("policies", layer_of(step))))
    layers = found.get(("layers", layer_of(step)))
    if layers is not None:
        edit |= _experts(layers, found)
        if step.kind == "add_layer":
            settings["input"] = _rows(layers.after["input"])
    return {**edit, **({"settings": settings} if settings else {})}


def coming(step: Step) -> Iterator[Change]:
    """The experts and gates that a step brings to its layer."""
    for change in step.changes:
        if change.section in ("experts", "gates") and change.after is not None and step.kind in LAYER_STEPS:
            yield change


def has_gate(step: Step) -> bool:
    """Whether a step brings a gate."""
    return any(is_gate_id(change.key) for change in coming(step))


def has_policies(step: Step) -> bool:
    """Whether a step changes the policies of a layer, and not a setting of the cluster."""
    return any(change.section == "policies" for change in step.changes)


def _experts(layers: Change, found: Mapping[tuple[str, str], Change]) -> dict[str, Any]:
    edit: dict[str, Any] = {"remove": [], "order": list(layers.after["experts"])}
    before = layers.before or {group: [] for group in _LISTS}
    for group in _LISTS:
        gone = [name for name in before[group] if name not in layers.after[group]]
        new = [name for name in layers.after[group] if name not in before[group]]
        edit["remove"] += gone
        edit[group] = {name: _expert(f"{layers.key}/{name}", found) for name in new}
    return edit


def _expert(id: str, found: Mapping[tuple[str, str], Change]) -> dict[str, Any]:
    made, place = found["experts", id].after, found["places", id].after
    replicas, rule = found.get(("replicas", place["group"])), found.get(("autoscale", place["group"]))
    fields = {key: made[key] for key in ("factory", "args", "kwargs", "framework", "weights")}
    fields |= {key: place[key] for key in ("num_gpus", "num_cpus", "resources")}
    pack = None if place["group"] == id else place["group"].partition("/")[2]
    count = 1 if replicas is None else replicas.after
    return {**fields, "pack": pack, "replicas": count, "autoscale": None if rule is None else rule.after}


def _settings(change: Change | None) -> dict[str, Any]:
    """The policies that differ."""
    if change is None:
        return {}
    before = change.before or {}
    return {name: value for name, value in change.after.items() if change.before is None or before.get(name) != value}


def _rows(spec: Mapping[str, Any]) -> list[Any]:
    return [spec["shape"], spec["dtype"]]
