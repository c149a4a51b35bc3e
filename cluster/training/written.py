"""Writes a trained layer as files, with a mesh.yaml that `expertmesh serve` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ...experts.errors import ConfigError
from ...experts.spec import ANY, Expert, TensorSpec
from ...experts.weights.files import save_module
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..machine.durable_files import write_private

MESH = "mesh.yaml"


def write_layer(folder: Path, layer: Layer, experts: Mapping[str, nn.Module], gate: Gate) -> dict[str, Path]:
    """Write the experts, the gate and a mesh.yaml; returns the safetensors files by id.

    Raises ConfigError for experts that no file can declare: live objects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    live = sorted(name for name, expert in layer.experts.items() if expert.factory is None)
    if live:
        raise ConfigError(f"expert {live[0]} is a live object, which no file can declare: give it a factory")
    files: dict[str, Path] = {}
    for name, module in experts.items():
        files[f"{layer.name}/{name}"] = folder / f"{name}.safetensors"
        save_module(files[f"{layer.name}/{name}"], module)
    if any(True for _ in gate.state_dict()):
        files[layer.gate_id] = folder / "gate.safetensors"
        gate.save(files[layer.gate_id])
    write_private(folder / MESH, _text(layer, gate, files))
    return files


def _text(layer: Layer, gate: Gate, files: Mapping[str, Path]) -> str:
    """The declaration as YAML, whose values are JSON."""
    declared = {"type": gate.name, **gate.config()}
    if layer.gate_id in files:
        declared["weights"] = files[layer.gate_id].name
    lines = ["layers:", f"  {json.dumps(layer.name)}:", f"    gate: {json.dumps(declared)}"]
    if layer.input != ANY:
        lines.append(f"    input: {json.dumps(_rows(layer.input))}")
    plain = {"combine": layer.combine, "on_missing": layer.on_missing, "on_dropped": layer.on_dropped}
    lines += [f"    {key}: {json.dumps(value)}" for key, value in plain.items()]
    if layer.capacity is not None:
        lines.append(f"    capacity: {json.dumps(asdict(layer.capacity))}")
    for group, members in (("experts", layer.experts), ("shared", layer.shared)):
        if members:
            lines.append(f"    {group}:")
            for name, expert in members.items():
                file = files.get(f"{layer.name}/{name}")
                lines.append(f"      {json.dumps(name)}: {json.dumps(_declared(expert, file))}")
    return "\n".join(lines) + "\n"


def _declared(expert: Expert, file: Path | None) -> dict[str, Any]:
    declared: dict[str, Any] = {"factory": expert.factory}
    if expert.args:
        declared["args"] = list(expert.args)
    if expert.kwargs:
        declared["kwargs"] = dict(expert.kwargs)
    if file is not None:
        declared["weights"] = file.name
    elif expert.weights is not None:
        declared["weights"] = str(Path(expert.weights).absolute())
    for name in ("input", "output"):
        if getattr(expert, name) != ANY:
            declared[name] = _rows(getattr(expert, name))
    for name, usual in (("replicas", 1), ("pack", None), ("num_gpus", None), ("num_cpus", None)):
        if getattr(expert, name, usual) not in (usual, None):
            declared[name] = getattr(expert, name)
    return declared


def _rows(spec: TensorSpec) -> dict[str, Any]:
    found = {"shape": None if spec.shape is None else list(spec.shape), "dtype": spec.dtype}
    return {key: value for key, value in found.items() if value is not None}
