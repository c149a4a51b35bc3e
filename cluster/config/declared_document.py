"""What a cluster declares, as a document of plain JSON values that can be compared with another one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...experts.errors import InvalidRequest
from ...experts.identity.canonical import canonical, sha256
from ...experts.spec import Expert, TensorSpec
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..placement.change_plan import SECTIONS
from .cluster_config import ClusterConfig

_APART = ("layers", "tokens", "runtime_env")
_POLICIES = ("combine", "on_missing", "max_lost_mass", "on_dropped")


def declared_document(
    layers: Iterable[Layer], digests: Mapping[str, str], codes: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The document of layers, as `check_layer` returns them, and settings, with the sections of `change_plan`.

    `digests` tell, by id, one declaration of an expert or gate from another one: its code and tensors are in them.
    `codes` are digests of the code alone, of experts.
    """
    document: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    document["settings"] |= {name: value for name, value in settings.items() if value is not None}
    for layer in layers:
        rows = _rows(layer.input)
        document["layers"][layer.name] = {"experts": [*layer.experts], "shared": [*layer.shared], "input": rows}
        document["policies"][layer.name] = _policies(layer)
        document["gates"][layer.gate_id] = {**_gate(layer.gate), "digest": digests[layer.gate_id]}
        for id, expert in layer.everyone_by_id.items():
            group = f"{layer.name}/{expert.pack}" if expert.pack else id
            document["experts"][id] = {**behaviour(expert), "code": codes[id], "digest": digests[id]}
            document["places"][id] = {**_place(expert), "group": group}
            document["replicas"][group] = expert.replicas
            if expert.autoscale is not None:
                document["autoscale"][group] = asdict(expert.autoscale)
    return document


def settings_document(config: ClusterConfig) -> dict[str, Any]:
    """The settings of a cluster by name, without `layers`; of what may hold secrets only a digest."""
    plain = {item.name: _plain(getattr(config, item.name)) for item in fields(config) if item.name not in _APART}
    tokens = sorted((entry.role.name, entry.sha256, str(entry.expires)) for entry in config.tokens)
    return {**plain, "tokens": _digest(tokens), "runtime_env": _digest(config.runtime_env)}


def _policies(layer: Layer) -> dict[str, Any]:
    capacity = None if layer.capacity is None else asdict(layer.capacity)
    return {name: getattr(layer, name) for name in _POLICIES} | {"capacity": capacity}


def _gate(gate: Gate) -> dict[str, Any]:
    try:
        return {"type": gate.name, "arguments": _plain(gate.config())}
    except InvalidRequest:  # it is made of a live object
        return {"type": gate.name, "arguments": None}


def behaviour(expert: Expert) -> dict[str, Any]:
    """What an expert is declared to compute, as plain JSON values."""
    weights = None if expert.weights is None else str(Path(expert.weights).absolute())
    return {
        "factory": expert.factory,
        "live": expert.ephemeral,
        "args": _plain(expert.args),
        "kwargs": _plain(expert.kwargs),
        "weights": weights,
        "framework": expert.framework,
    }


def _place(expert: Expert) -> dict[str, Any]:
    return {
        "num_gpus": expert.num_gpus,
        "num_cpus": expert.num_cpus,
        "resources": _plain(expert.resources),
        "runtime_env": _digest(expert.runtime_env),
    }


def _rows(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": None if spec.shape is None else list(spec.shape), "dtype": spec.dtype}


def _digest(secret: Any) -> str | None:
    return sha256(canonical(secret)) if secret else None


def _plain(value: Any) -> Any:
    """A value as JSON reads it back; what JSON does not know is its canonical text."""
    try:
        return json.loads(json.dumps(value, sort_keys=True, default=_text), parse_constant=str)
    except (TypeError, ValueError):
        return canonical(value)


def _text(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Path) else canonical(value)
