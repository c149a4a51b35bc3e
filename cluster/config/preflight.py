"""Checks before any process starts: code, weights, and specs that do not fit together."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

from ...experts.construct.factory import locate
from ...experts.construct.probe import check_declaration
from ...experts.errors import ConfigError, ExpertMeshError, SpecMismatch
from ...experts.spec import FLOATING, Expert, TensorSpec
from ...router.mixture.layer import Layer


def check_layer(layer: Layer, *, code_elsewhere: bool = False, checked: Collection[str] = ()) -> Layer:
    """Check the experts of a layer against each other; returns the layer with the specs of its rows filled in.

    The ids in `checked` were checked before: their specs are filled in, and their files may be gone.
    With `code_elsewhere` (a `runtime_env`), a factory may be missing here; its replica then checks it.
    Raises ConfigError, SpecMismatch, NotFound or DataLoss.
    """
    specs_of: dict[str, tuple[TensorSpec, TensorSpec]] = {}
    for expert_id, expert in layer.everyone_by_id.items():
        if expert_id in checked or ((code_elsewhere or expert.runtime_env) and not _is_here(expert)):
            specs_of[expert_id] = (expert.input, expert.output)
            continue
        try:
            specs_of[expert_id] = check_declaration(expert, expert_id, layer.input)
        except ExpertMeshError as error:
            if expert_id in error.message:
                raise
            raise type(error)(f"{expert_id}: {error.message}") from error
    input_spec = _common(
        {name: specs[0] for name, specs in specs_of.items()}, layer.input, f"layer {layer.name}", "takes"
    )
    output_spec = _common({name: specs[1] for name, specs in specs_of.items()}, TensorSpec(), layer.name, "gives")
    experts = {
        name: expert.with_specs(_filled(own_input, input_spec), _filled(own_output, output_spec))
        for (name, expert), (own_input, own_output) in zip(layer.everyone.items(), specs_of.values(), strict=True)
    }
    gate = copy.deepcopy(layer.gate).eval()  # no noise, no dropout, isolated from later changes by its owner
    return replace(layer.with_experts(experts), gate=gate, input=input_spec)


def _filled(own: TensorSpec, common: TensorSpec) -> TensorSpec:
    """An expert's row spec, completed from the layer's; the layer's floating dtype is not copied."""
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
