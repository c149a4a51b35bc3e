"""The layers that a start declares: those of the configuration, but for what was changed by name while they served."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...experts.errors import ExpertMeshError, FailedPrecondition, NotFound
from ...experts.names import GATE, is_layer_id
from ...experts.spec import Expert
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..config.layer_document import layer_digest, layer_of
from ..control.candidate_records import expert_of
from ..placement.plan import groups_of
from ..state.records import VersionRecord
from ..state.registry import kept_records, removed_layers
from ..state.version_folders import VersionStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a start declares.

    The `ids` are declared by what the registry says of them, those of `redeclare` by the configuration, although they
    were changed by name. `lines` say what is not as in the configuration.
    """

    layers: Mapping[str, Layer]
    ids: frozenset[str] = frozenset()
    redeclare: frozenset[str] = frozenset()
    lines: tuple[str, ...] = ()


def resumed_layers(declared: Mapping[str, Layer], state_dir: Path, redeclare: Collection[str]) -> Resumed:
    """The layers that are `declared`, as `check_layer` returns them, but for what the state folder knows better.

    What is named in `redeclare` is taken as it is declared. Raises NotFound for an id in it that nobody knows.
    """
    kept, removed = kept_records(state_dir), removed_layers(state_dir)
    known = {id for layer in declared.values() for id in (*layer.everyone_by_id, *groups_of(layer), *layer.own_ids)}
    known |= kept.keys() | removed
    if unknown := sorted(set(redeclare) - known):
        raise NotFound(
            f"redeclare: there is no expert or gate {unknown[0]!r}; known are {', '.join(sorted(known)[:20])}"
        )
    gone = {id.partition("/")[0] for id in removed - set(redeclare)} & declared.keys()
    found = Resumed(
        layers={name: layer for name, layer in declared.items() if name not in gone},
        lines=tuple(f"layer {name} was removed and stays away; redeclare {name}/layer to have it" for name in gone),
    )
    changed = {id: record for id, record in kept.items() if is_layer_id(id) and not record.declared}
    for id, record in changed.items():
        found = _with(found, declared.get(id.partition("/")[0]), record, kept, VersionStore(state_dir), redeclare)
    return found


def _with(
    found: Resumed,
    declared: Layer | None,
    record: VersionRecord,
    kept: Mapping[str, VersionRecord],
    store: VersionStore,
    redeclare: Collection[str],
) -> Resumed:
    """With one layer that was changed by name."""
    name = record.id.partition("/")[0]
    if declared is not None and layer_digest(declared) == record.digest:
        return found
    gate_id = f"{name}/{GATE}"
    if record.id in redeclare:
        return replace(found, redeclare=found.redeclare | {gate_id} if declared is not None else found.redeclare)
    if gate_id in redeclare:
        raise FailedPrecondition(
            f"redeclare: layer {name} was changed together with {gate_id}: name {record.id}, for both"
        )
    layer, ids = _layer(name, record.origin["layer"], declared, kept, store)
    if layer is None:
        line = f"layer {name} was changed with live objects, which no file can bring back: it is as declared"
        names = {record.id, gate_id} if declared is not None else set()
        return replace(found, redeclare=found.redeclare | names, lines=(*found.lines, line))
    was = "added" if declared is None else "changed"
    line = f"layer {name} serves as it was {was}; redeclare {record.id} to have what is declared"
    return replace(
        found, layers={**found.layers, name: layer}, ids=found.ids | ids | {record.id}, lines=(*found.lines, line)
    )


def _layer(
    name: str,
    document: Mapping[str, Any],
    declared: Layer | None,
    kept: Mapping[str, VersionRecord],
    store: VersionStore,
) -> tuple[Layer | None, set[str]]:
    """The layer of a document, and the ids that are not declared; None where live objects are missing."""
    layer = layer_of(name, document)
    known = {} if declared is None else declared.everyone
    experts: dict[str, Expert] = {}
    ids = set()
    for expert, placed in layer.everyone.items():
        id = f"{name}/{expert}"
        record = kept.get(id)
        if expert in known:
            experts[expert] = replace(known[expert], pack=placed.pack, autoscale=placed.autoscale)
        elif record is None or record.origin.get("live"):
            return None, set()
        else:
            made = expert_of(record.origin)
            behaviour = {key: getattr(made, key) for key in ("factory", "args", "kwargs", "framework", "input")}
            experts[expert] = replace(placed, **behaviour, live=None)
            ids.add(id)
    gate = _gate(f"{name}/{GATE}", kept, store)
    if gate is None and declared is not None and declared.gate.num_experts == layer.gate.num_experts:
        gate = declared.gate
    elif gate is None:
        return None, set()
    else:
        ids.add(f"{name}/{GATE}")
    return replace(layer.with_experts(experts), gate=gate), ids


def _gate(id: str, kept: Mapping[str, VersionRecord], store: VersionStore) -> Gate | None:
    """The gate that serves; None for a live one. Where its file is damaged, the controller will say so."""
    record = kept.get(id)
    if record is None or record.origin.get("live"):
        return None
    try:
        weights = store.weights(id, record.version)
        return None if weights is None else Gate.load(weights)
    except ExpertMeshError as error:
        log.warning("%s: %s", id, error)
        return None
