"""What can be known to be wrong before any process starts: GPUs, code, weights, and specs that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from ...experts.construct.factory import locate
from ...experts.construct.probe import check_declaration
from ...experts.errors import ConfigError, ExpertMeshError, SpecMismatch
from ...experts.spec import FLOATING, Expert, TensorSpec
from ...router.mixture.layer import Layer


def check_gpus(layers: Iterable[Layer], available: float) -> None:
    """Check that there are GPUs where experts ask for them. Raises ConfigError that says how to run on CPU."""
    for layer in layers:
        for expert_id, expert in layer.everyone_by_id.items():
            if expert.num_gpus > available:
                raise ConfigError(
                    f"{expert_id} asks for num_gpus={expert.num_gpus:g}, but this cluster has {available:g} GPUs. "
                    "To run it on CPU, leave num_gpus out or set it to 0"
                )


def check_layer(layer: Layer, *, code_elsewhere: bool = False) -> Layer:
    """Check the experts of a layer against each other; returns the layer with what was found out of its rows.

    With `code_elsewhere` (a `runtime_env`) a factory may be missing here; then its replica checks it.
    Raises ConfigError, SpecMismatch, NotFound or DataLoss.
    """
    found: dict[str, tuple[TensorSpec, TensorSpec]] = {}
    for expert_id, expert in layer.everyone_by_id.items():
        if (code_elsewhere or expert.runtime_env) and not _is_here(expert):
            found[expert_id] = (expert.input, expert.output)
            continue
        try:
            found[expert_id] = check_declaration(expert, expert_id, layer.input)
        except ExpertMeshError as error:
            if expert_id in error.message:
                raise
            raise type(error)(f"{expert_id}: {error.message}") from error
    input_spec = _common({name: specs[0] for name, specs in found.items()}, layer.input, f"layer {layer.name}", "takes")
    output_spec = _common({name: specs[1] for name, specs in found.items()}, TensorSpec(), layer.name, "gives")
    experts = {
        name: expert.with_specs(_filled(taken, input_spec), _filled(given, output_spec))
        for (name, expert), (taken, given) in zip(layer.everyone.items(), found.values(), strict=True)
    }
    gate = copy.deepcopy(layer.gate).eval()  # no noise, no dropout, and none of what its owner does to it later
    return replace(layer.with_experts(experts), gate=gate, input=input_spec)


def _filled(own: TensorSpec, common: TensorSpec) -> TensorSpec:
    """What an expert says of its rows, and where it says nothing what the layer does; floating dtypes stay its own."""
    dtype = own.dtype or (None if common.dtype in FLOATING else common.dtype)
    return TensorSpec(own.shape if own.shape is not None else common.shape, dtype)


def _is_here(expert: Expert) -> bool:
    try:
        return expert.factory is None or locate(expert.factory) is not None
    except ConfigError:
        return False


def _common(specs: dict[str, TensorSpec], start: TensorSpec, where: str, verb: str) -> TensorSpec:
    common, source = start, where
    for name, spec in specs.items():
        if not common.agrees(spec):
            raise SpecMismatch(
                f"{where}: {name} {verb} rows of {spec}, but {source} of {common}: they do not fit together"
            )
        if common.shape is None and spec.shape is not None:
            common, source = TensorSpec(spec.shape, common.dtype or spec.dtype), name
        elif common.dtype is None and spec.dtype is not None:
            common = TensorSpec(common.shape, spec.dtype)
    return common
