"""The targets of a load: layers, and random rows that fit them, from mesh.yaml and the status document.

mesh.yaml is read as data: the code it names is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...experts.errors import ConfigError, ExpertMeshError, InvalidRequest, NotFound
from ...experts.spec import ANY, TensorSpec
from ...experts.suggestion import suggestion
from ..config.yaml_file import read_document, read_trusted
from ..machine.run_files import DEFAULT_NAME, find

DEFAULT_DTYPE = "float32"
BATCHES = 16
_INTEGERS_BELOW = 100


@dataclass(frozen=True, kw_only=True)
class MeshFile:
    """The part of a configuration file that a load needs: the cluster's name, and the declared rows of each layer."""

    name: str = DEFAULT_NAME
    layers: Mapping[str, TensorSpec] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer, and the trailing shape and dtype of the rows to send."""

    layer: str
    shape: tuple[int, ...]
    dtype: str = DEFAULT_DTYPE

    def batches(self, rows: int, seed: int) -> list[np.ndarray[Any, Any]]:
        """`BATCHES` batches of random rows [rows, *shape], to send in turn; bfloat16 rows as their uint16 bits.

        Floating-point rows are standard normal, integers lie in [0, 100). Equal arguments give equal rows.
        """
        generator = np.random.default_rng([seed, *self.layer.encode()])
        return [_random_rows(generator, (rows, *self.shape), self.dtype) for _ in range(BATCHES)]


def _random_rows(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(np.bool_)
    if dtype == "bfloat16":
        return (generator.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("float"):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, _INTEGERS_BELOW, shape).astype(dtype)


def read_mesh(path: Path) -> MeshFile:
    """Read name and rows from a configuration file; EXPERTMESH_NAME overrides the file, as in `serve`.

    Raises ConfigError for a file that cannot be read or has no layers.
    """
    document = read_document(read_trusted(path), str(path))
    document.raise_if_wrong()
    layers = _map(document.data.get("layers"))
    if not layers:
        raise ConfigError(f"{document.place(('layers',)).text}: the file has no layers to send requests to")
    name = os.environ.get("EXPERTMESH_NAME") or document.data.get("name") or DEFAULT_NAME
    return MeshFile(name=str(name), layers={key: _declared(_map(layer)) for key, layer in layers.items()})


def _declared(layer: Mapping[str, Any]) -> TensorSpec:
    """The rows that a layer declares; what it leaves open comes from the first expert that declares it."""
    spec = ANY
    for node in (layer, *_map(layer.get("experts")).values()):
        spec = spec.filled(_spec(_map(node).get("input")))
    return spec


def _map(value: object) -> Mapping[str, Any]:
    """A value that is a map, or an empty one: what should be one is refused by the cluster itself."""
    return value if isinstance(value, dict) else {}


def _spec(plain: object) -> TensorSpec:
    """A spec from {"shape": ..., "dtype": ...}; ANY for an invalid one, which the cluster itself refuses."""
    if not isinstance(plain, Mapping):
        return ANY
    try:
        return TensorSpec(plain.get("shape"), plain.get("dtype"))
    except (ExpertMeshError, TypeError):
        return ANY


def check_running(name: str, path: Path, name_option: str | None) -> None:
    """Raise NotFound, with the command to start it, if the cluster of a configuration file is not running."""
    try:
        find(name)
    except NotFound:
        start = f"expertmesh serve {path}" + (f" --name {name_option}" if name_option else "")
        raise NotFound(f"cluster {name!r} of {path} is not running on this machine: start it with `{start}`") from None


def targets(
    layers: Sequence[str],
    status: Mapping[str, Any],
    mesh: MeshFile | None,
    *,
    width: int | None = None,
    dtype: str | None = None,
) -> tuple[Target, ...]:
    """The targets for the named layers; by default for those of the file, or else for all layers of the cluster.

    `width` applies where no shape is declared; `dtype` overrides a declared one. Raises NotFound for a layer that is
    not served, with the closest name that is, and InvalidRequest where the shape of the rows is unknown.
    """
    serving: Mapping[str, Any] = status.get("layers") or {}
    if not serving:
        raise NotFound(f"cluster {status.get('name')} serves no layer now: see `expertmesh status`")
    declared = {} if mesh is None else mesh.layers
    aims = []
    for name in dict.fromkeys(layers or declared or serving):
        if name not in serving:
            hint = suggestion(name, serving, "it serves")
            raise NotFound(f"cluster {status.get('name')} serves no layer {name!r}{hint}")
        spec = _spec(serving[name].get("input")).filled(declared.get(name, ANY))
        if spec.shape is None and width is None:
            raise InvalidRequest(
                f"the rows of layer {name} have no declared shape: give --width, "
                f"or declare `input: {{shape: [...]}}` for it in the configuration"
            )
        shape = spec.shape if spec.shape is not None else (width or 1,)
        aims.append(Target(layer=name, shape=shape, dtype=dtype or spec.dtype or DEFAULT_DTYPE))
    return tuple(aims)
