"""What a load is aimed at: the layers, and rows such as each of them takes, from mesh.yaml and the status document.

mesh.yaml is read as data: none of the code that it names is imported.
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
from ..config.value_tree import Located, Mistakes
from ..config.yaml_file import parse_tree, read_trusted
from ..machine.run_files import DEFAULT_NAME, find

DEFAULT_DTYPE = "float32"
BATCHES = 16
_INTEGERS_BELOW = 100


@dataclass(frozen=True, kw_only=True)
class MeshFile:
    """What a configuration file says of a cluster: its name, and by layer the rows as far as they are declared."""

    name: str = DEFAULT_NAME
    layers: Mapping[str, TensorSpec] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer, and the trailing shape and dtype of the rows that it is sent."""

    layer: str
    shape: tuple[int, ...]
    dtype: str = DEFAULT_DTYPE

    def batches(self, rows: int, seed: int) -> list[np.ndarray[Any, Any]]:
        """A few requests of random rows [rows, *shape], to be sent in turn; those of bfloat16 as their uint16 bits.

        Floating rows are normal, integers lie in [0, 100). Equal arguments give equal rows.
        """
        generator = np.random.default_rng([seed, *self.layer.encode()])
        return [_drawn(generator, (rows, *self.shape), self.dtype) for _ in range(BATCHES)]


def _drawn(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(np.bool_)
    if dtype == "bfloat16":
        return (generator.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("float"):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, _INTEGERS_BELOW, shape).astype(dtype)


def read_mesh(path: Path) -> MeshFile:
    """Read name and rows from a configuration file; EXPERTMESH_NAME wins over the file, as in `serve`.

    Raises ConfigError for a file that cannot be read or has no layers.
    """
    found = Mistakes()
    tree = parse_tree(read_trusted(path), str(path), found)
    found.raise_if_any(str(path))
    entries = dict(tree.items())
    layers = dict(entries["layers"].items()) if "layers" in entries else {}
    if not layers:
        raise ConfigError(f"{tree.where_of('layers')}: the file has no layers to send requests to")
    given = entries["name"].value if "name" in entries else None
    name = os.environ.get("EXPERTMESH_NAME") or given or DEFAULT_NAME
    return MeshFile(name=str(name), layers={key: _declared(layer) for key, layer in layers.items()})


def _declared(layer: Located) -> TensorSpec:
    """What a layer says of its rows, or else one of its experts."""
    entries = dict(layer.items())
    experts = [expert for _, expert in entries["experts"].items()] if "experts" in entries else []
    spec = ANY
    for node in (layer, *experts):
        given = _spec(dict(node.items()).get("input", Located(None, node.where)).plain())
        spec = spec.filled(given)
    return spec


def _spec(plain: object) -> TensorSpec:
    """A spec from {"shape": ..., "dtype": ...}; what is none says nothing here, and the cluster itself refuses it."""
    if not isinstance(plain, Mapping):
        return ANY
    try:
        return TensorSpec(plain.get("shape"), plain.get("dtype"))
    except (ExpertMeshError, TypeError):
        return ANY


def check_running(name: str, path: Path, named: str | None) -> None:
    """Check that the cluster of a configuration file runs. Raises NotFound that says how to start it."""
    try:
        find(name)
    except NotFound:
        start = f"expertmesh serve {path}" + (f" --name {named}" if named else "")
        raise NotFound(f"cluster {name!r} of {path} does not run here: start it with `{start}`") from None


def targets(
    wanted: Sequence[str],
    status: Mapping[str, Any],
    mesh: MeshFile | None,
    *,
    width: int | None = None,
    dtype: str | None = None,
) -> tuple[Target, ...]:
    """The layers to send to: those that are wanted, by default those of the file, or else all of the cluster.

    `width` stands in where no shape is declared, and `dtype` wins over what is. Raises NotFound for a layer that does
    not serve, with the nearest that does, and InvalidRequest where nobody declares the shape of the rows.
    """
    serving: Mapping[str, Any] = status.get("layers") or {}
    if not serving:
        raise NotFound(f"cluster {status.get('name')} serves no layer now: see `expertmesh status`")
    declared = {} if mesh is None else mesh.layers
    made = []
    for name in dict.fromkeys(wanted or declared or serving):
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
        made.append(Target(layer=name, shape=shape, dtype=dtype or spec.dtype or DEFAULT_DTYPE))
    return tuple(made)
