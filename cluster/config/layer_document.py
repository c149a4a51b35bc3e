"""What a layer is made of, as plain JSON: the version that an epoch names, and a restart reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...experts.identity.canonical import canonical, sha256
from ...experts.spec import Autoscale, Expert, TensorSpec
from ...router.gates import Fixed
from ...router.mixture.capacity import Capacity
from ...router.mixture.layer import Layer, not_in_this_process

REVISION = 1
_PLAIN = ("combine", "on_missing", "max_lost_mass", "on_dropped")
_PLACE = ("num_gpus", "num_cpus", "replicas")


def layer_document(layer: Layer) -> dict[str, Any]:
    """A layer without its gate, and without what its experts compute: these have versions of their own."""
    return {
        **{name: getattr(layer, name) for name in _PLAIN},
        "capacity": None if layer.capacity is None else asdict(layer.capacity),
        "input": spec_document(layer.input),
        "experts": [[name, _expert(expert)] for name, expert in layer.experts.items()],
        "shared": [[name, _expert(expert)] for name, expert in layer.shared.items()],
    }


def layer_digest(layer: Layer) -> str:
    """What the digits of a layer's version are computed from: all of its document but where its experts run."""
    document = layer_document(layer)
    for _, expert in (*document["experts"], *document["shared"]):
        del expert["place"]
    return sha256("layer", str(REVISION), canonical(document))


def layer_of(name: str, document: Mapping[str, Any]) -> Layer:
    """The layer of a document, with some other gate, and experts that only say where they run."""
    capacity = document["capacity"]
    return Layer(
        name,
        Fixed([1.0] * len(document["experts"])),
        {name: _placed(expert) for name, expert in document["experts"]},
        shared={name: _placed(expert) for name, expert in document["shared"]},
        capacity=None if capacity is None else Capacity(**capacity),
        input=spec_of(document["input"]),
        **{name: document[name] for name in _PLAIN},
    )


def spec_document(spec: TensorSpec) -> list[Any]:
    """A spec of rows as JSON."""
    return [None if spec.shape is None else list(spec.shape), spec.dtype]


def spec_of(pair: list[Any]) -> TensorSpec:
    """The spec of rows that `spec_document` wrote."""
    return TensorSpec(None if pair[0] is None else tuple(pair[0]), pair[1])


def _expert(expert: Expert) -> dict[str, Any]:
    place = {name: getattr(expert, name) for name in _PLACE}
    return {
        "pack": expert.pack,
        "output": spec_document(expert.output),
        "autoscale": None if expert.autoscale is None else asdict(expert.autoscale),
        "place": {
            **place,
            "factory": expert.factory,
            "resources": dict(expert.resources),
            "runtime_env": _environment(expert.runtime_env),
        },
    }


def _placed(document: Mapping[str, Any]) -> Expert:
    rule, place = document["autoscale"], document["place"]
    return Expert(
        pack=document["pack"],
        output=spec_of(document["output"]),
        autoscale=None if rule is None else Autoscale(**rule),
        live=None if place["factory"] else not_in_this_process,
        **place,
    )


def _environment(environment: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A runtime environment as JSON has it; None for one that JSON cannot hold, of live modules."""
    try:
        plain: dict[str, Any] | None = json.loads(json.dumps(environment))
    except (TypeError, ValueError):
        return None
    return plain
