"""From a declaration to a candidate, and from a record of the registry back to one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...experts.construct.factory import locate
from ...experts.errors import ConfigError, FailedPrecondition
from ...experts.identity.canonical import canonical, sha256
from ...experts.identity.code_digest import RECIPE, code_digest, examined
from ...experts.identity.version_name import gate_digest
from ...experts.spec import Expert
from ...experts.weights.files import tensor_digest, tensors_of
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..config.layer_document import layer_document, layer_of, spec_document, spec_of
from ..machine.durable_files import hash_file
from ..state.records import VersionRecord
from ..state.version_folders import VersionStore
from .messages import Candidate

LIVE = {"live": True, "recipe": RECIPE}


def origin_of(expert: Expert) -> dict[str, Any]:
    """The declaration of an expert as JSON; that of a live object only says that it is one.

    `recipe` says how its versions are made; a record without it is from before there were several.
    """
    plain = {
        "recipe": RECIPE,
        "factory": expert.factory,
        "args": list(expert.args),
        "kwargs": dict(expert.kwargs),
        "framework": expert.framework,
        "input": spec_document(expert.input),
        "output": spec_document(expert.output),
    }
    try:
        kept: dict[str, Any] = json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError):
        return dict(LIVE)
    return dict(LIVE) if expert.ephemeral or kept != plain else kept


def declared_digest(expert: Expert, owner: str = "", code: str | None = None) -> str:
    """What tells an edited declaration from the one of the last start: everything but where the expert runs.

    A live object that hides state is another one in every process that declares it: `owner` is the id of that process.
    `code` is its `factory_code`, where that is known.
    """
    parts = [canonical(expert.args), canonical(dict(expert.kwargs)), f"{expert.input}|{expert.output}"]
    if expert.live is not None:
        tensors = tensors_of(expert.live) if isinstance(expert.live, nn.Module) else {}
        found = examined(expert.live, live=True)
        return sha256("live", *parts, found.digest, tensor_digest(tensors), owner if found.opaque else "")
    weights = "" if expert.weights is None else hash_file(Path(expert.weights))[0]
    code = factory_code(expert) if code is None else code
    return sha256(str(expert.factory), code, str(expert.framework), weights, *parts)


def factory_code(expert: Expert) -> str:
    """The digest of the code of a factory; "" for a live object, and for code that is only where the expert runs."""
    try:
        return "" if expert.factory is None else code_digest(locate(expert.factory))
    except ConfigError:
        return ""


def declared_gate_digest(gate: Gate) -> str:
    """The same for a gate."""
    return gate_digest(gate.name, gate, gate.state_dict())


def from_record(record: VersionRecord, store: VersionStore, live: Mapping[tuple[str, str], Candidate]) -> Candidate:
    """The candidate that brings a version of the registry back into memory.

    Raises FailedPrecondition for a live object that nobody has registered since the last cold start.
    """
    held = live.get((record.id, record.version))
    if held is not None:
        return replace(held, version=record.version, origin=record.origin)
    if record.origin.get("live"):
        raise FailedPrecondition(
            f"{record.id} {record.version} was a live object: register it again with the same code"
        )
    weights = store.weights(record.id, record.version)
    if "layer" in record.origin:
        layer = layer_of(record.id.partition("/")[0], record.origin["layer"])
        return Candidate(
            id=record.id, counter=record.counter, layer=layer, version=record.version, origin=record.origin
        )
    if "gate" in record.origin:
        if weights is None:
            raise FailedPrecondition(f"{record.id} {record.version} has no file: register the gate again")
        gate = Gate.load(weights)
        return Candidate(id=record.id, counter=record.counter, gate=gate, version=record.version, origin=record.origin)
    return Candidate(
        id=record.id,
        counter=record.counter,
        expert=expert_of(record.origin),
        weights=weights,
        version=record.version,
        origin=record.origin,
    )


def expert_of(origin: Mapping[str, Any]) -> Expert:
    """The expert that a record's origin declares, without weights and without a place to run."""
    return Expert(
        factory=origin["factory"],
        args=tuple(origin["args"]),
        kwargs=origin["kwargs"],
        framework=origin["framework"],
        input=spec_of(origin["input"]),
        output=spec_of(origin["output"]),
    )


def declared_candidates(layer: Layer) -> dict[str, Candidate]:
    """The candidates that a layer declares, its gate among them, with counter 0: who stages them gives the number."""
    found: dict[str, Candidate] = {}
    for id, expert in layer.everyone_by_id.items():
        weights = None if expert.weights is None else Path(expert.weights)
        plain = replace(expert, weights=None)
        found[id] = Candidate(
            id=id,
            counter=0,
            expert=plain,
            weights=weights,
            input=layer.input,
            output=expert.output,
            origin=origin_of(expert),
            note="declared",
        )
    origin: dict[str, Any] = {"gate": layer.gate.name}
    found[layer.gate_id] = Candidate(id=layer.gate_id, counter=0, gate=layer.gate, origin=origin, note="declared")
    origin = {"layer": layer_document(layer)}
    plain_layer = layer.without_live_objects()
    found[layer.layer_id] = Candidate(id=layer.layer_id, counter=0, layer=plain_layer, origin=origin, note="declared")
    return found
