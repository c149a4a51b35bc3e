"""Changes of layers that serve: experts that come and go, with the layer's new gate, and whole layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError, InvalidRequest, NotFound
from ...experts.spec import Autoscale, Expert
from ...experts.suggestion import suggestion
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..rpc.changes import ADD, CHANGE, REMOVE, SETTINGS


@dataclass(frozen=True, kw_only=True)
class LayerEdit:
    """What becomes of one layer: it is added, changed or removed, as `kind` says.

    `experts` and `shared` are those that come, by name, and `remove` names those that go. `order` are the names of all
    routed experts afterwards, in the order of the gate; by default those that stay, then those that come. `gate` is
    the layer's new gate, or the file that `Gate.save` wrote; None keeps the one that serves. `settings` are fields of
    `Layer`: combine, on_missing, max_lost_mass, on_dropped, capacity, input. `autoscale` are the rules of experts or
    packs by name, None to have none.
    """

    kind: str = CHANGE
    experts: Mapping[str, Expert] = field(default_factory=dict)
    shared: Mapping[str, Expert] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    gate: Gate | Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    autoscale: Mapping[str, Autoscale | None] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Layer) -> LayerEdit:
        """The edit that adds a layer."""
        settings = {name: getattr(layer, name) for name in SETTINGS}
        return cls(kind=ADD, experts=layer.experts, shared=layer.shared, gate=layer.gate, settings=settings)


@dataclass(frozen=True, kw_only=True)
class LayersRequest:
    """Edits of layers, by name, that become one epoch: all of them or none, within `timeout` seconds.

    `adopts` are the digests of the declarations that they carry out, by id. `files` are the sha256 of the uploaded
    files among what they name. `versions` are those that experts and gates that come had before, by id, in place of
    what is declared; such a gate is in no edit. `allow_unverified` accepts experts that cannot be tried, because no
    rows were declared or served.
    """

    change_id: str
    layers: Mapping[str, LayerEdit]
    adopts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 120.0
    allow_unverified: bool = False


def edited(
    layers: Mapping[str, Layer], edits: Mapping[str, LayerEdit], factories: Collection[str] = ()
) -> dict[str, Layer]:
    """The layers after these edits. A gate that comes as a file may import the code of these `factories`.

    Raises NotFound for a layer or expert that is not there, InvalidRequest for one that is there already or goes and
    comes, and for a gate that picks among another number of experts, and what reading a gate's file raises.
    """
    after = dict(layers)
    for name, edit in edits.items():
        if edit.kind == ADD and name in layers:
            raise InvalidRequest(f"there is a layer {name!r} already: change it, or remove it first")
        if edit.kind != ADD and name not in layers:
            raise NotFound(f"there is no layer {name!r}{suggestion(name, layers, 'known are')}")
        if edit.kind == REMOVE:
            del after[name]
            continue
        try:
            gate = edit.gate if not isinstance(edit.gate, Path) else Gate.load(edit.gate, factories=factories)
            after[name] = _added(name, edit, gate) if edit.kind == ADD else _changed(layers[name], edit, gate)
        except ConfigError as error:
            raise InvalidRequest(error.message) from None
    if not after:
        raise InvalidRequest("a cluster needs a layer: add another one before the last is removed")
    return after


def _added(name: str, edit: LayerEdit, gate: Gate | None) -> Layer:
    if gate is None:
        raise InvalidRequest(f"layer {name}: it needs a gate")
    return Layer(name, gate, _ordered(name, edit.experts, edit.order), shared=edit.shared, **edit.settings)


def _changed(layer: Layer, edit: LayerEdit, new_gate: Gate | None) -> Layer:
    known = layer.everyone
    for name in edit.remove:
        if name not in known:
            raise NotFound(f"layer {layer.name} has no expert {name!r}{suggestion(name, known, 'it has')}")
    for name in (*edit.experts, *edit.shared):
        if name in known:
            raise InvalidRequest(f"layer {layer.name} has an expert {name!r} already: swap it, or choose another name")
    experts = {name: expert for name, expert in layer.experts.items() if name not in edit.remove}
    shared = {name: expert for name, expert in layer.shared.items() if name not in edit.remove}
    comes = {name: _beside(expert, known) for name, expert in edit.experts.items()}
    comes_shared = {name: _beside(expert, known) for name, expert in edit.shared.items()}
    experts = _ordered(layer.name, {**experts, **comes}, edit.order)
    gate = layer.gate if new_gate is None else new_gate
    if new_gate is None and gate.num_experts != len(experts):
        raise InvalidRequest(
            f"layer {layer.name}: its gate picks among {gate.num_experts} experts, and there will be {len(experts)}: "
            "give its new gate with the change"
        )
    changed = replace(layer, gate=gate, experts=experts, shared={**shared, **comes_shared}, **edit.settings)
    return changed.with_experts(_scaled(changed, edit.autoscale))


def _beside(expert: Expert, known: Mapping[str, Expert]) -> Expert:
    """An expert as it runs beside the others of its pack, of which there are as many as there are."""
    mates = [mate for mate in known.values() if expert.pack and mate.pack == expert.pack]
    return replace(expert, replicas=mates[0].replicas, autoscale=mates[0].autoscale) if mates else expert


def _ordered(layer: str, experts: Mapping[str, Expert], order: tuple[str, ...]) -> dict[str, Expert]:
    if order and (set(order) != set(experts) or len(order) != len(experts)):
        raise InvalidRequest(f"layer {layer}: order must name each of its experts once: {', '.join(experts)}")
    return {name: experts[name] for name in order or experts}


def _scaled(layer: Layer, rules: Mapping[str, Autoscale | None]) -> dict[str, Expert]:
    """The experts with other rules of scaling, by the name of an expert or a pack."""
    experts = layer.everyone
    for group, rule in rules.items():
        named = [name for name, expert in experts.items() if (expert.pack or name) == group]
        if not named:
            raise NotFound(f"layer {layer.name} has no expert or pack {group!r} to scale")
        experts |= {name: replace(experts[name], autoscale=rule) for name in named}
    return experts
