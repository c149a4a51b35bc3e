"""Determines the rows that an expert takes and returns: from its declaration, else by a call with two rows of zeros."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ExpertMeshError, SpecMismatch
from ..spec import FLOATING, Expert, TensorSpec
from ..tensors import dtype_name, torch_dtype
from ..weights.files import check_fit, describe_tensors
from ..weights.header import DTYPES
from .factory import RowFunction, build, with_own_copy


def complete(function: RowFunction, name: str) -> tuple[TensorSpec, TensorSpec]:
    """The input and output spec of a built expert; probes the output if the shape of the input is known.

    Raises SpecMismatch if the expert fails on such rows, or its output differs from its declaration.
    """
    expert = function.expert
    input_spec = _input_spec(function)
    if input_spec.shape is None:
        return input_spec, expert.output
    dtype = torch_dtype(input_spec.dtype or "float32")
    rows = torch.zeros((2, *input_spec.shape), dtype=dtype, device=function.device)
    try:
        with torch.inference_mode():
            answer = function(rows)
    except (Exception, SystemExit) as error:
        reason = error.message if isinstance(error, ExpertMeshError) else f"{type(error).__name__}: {error}"
        raise SpecMismatch(f"{name} does not take rows of {input_spec}: {reason}") from error
    return input_spec, _output_spec(expert, answer, name)


def check_declaration(expert: Expert, name: str, rows: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Check an expert before any actor starts, without allocating its weights: code, weights header, specs.

    `rows` is the layer's spec, used where the expert declares nothing, except that each expert keeps its own
    floating-point dtype. Raises ConfigError, SpecMismatch, NotFound or DataLoss.
    """
    function = without_weights(expert)
    check_weights(expert, function, name)
    return check_rows(expert, function, name, rows)


def check_rows(expert: Expert, function: RowFunction, name: str, rows: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The specs of an expert built by `without_weights`; `rows` is as in `check_declaration`.

    Raises SpecMismatch.
    """
    shape = expert.input.shape if expert.input.shape is not None else rows.shape
    input_spec = TensorSpec(shape, expert.input.dtype or (None if rows.dtype in FLOATING else rows.dtype))
    declared = expert.with_specs(input_spec, expert.output)
    try:
        return complete(RowFunction(function.function, declared, function.device), name)
    except SpecMismatch as error:
        if _needs_data(error.__cause__):  # the replica checks it
            return input_spec, expert.output
        raise


def without_weights(expert: Expert) -> RowFunction:
    """An expert for checks, built on torch's "meta" device, without memory for tensors, if its code supports that.

    Raises ConfigError.
    """
    if expert.live is not None:
        own = with_own_copy(expert, "every replica")  # building freezes a module
        return build(own, load_weights=False)
    try:
        function = build(expert, "meta", load_weights=False)
    except ConfigError as error:
        if not _needs_data(error.__cause__):
            raise
        return build(expert, load_weights=False)
    if function.module is None:  # a plain function allocates no weights, and may not support meta tensors
        return build(expert)
    return function


def _needs_data(error: BaseException | None) -> bool:
    """Whether code failed only because tensors on the device "meta" have no data."""
    return isinstance(error, NotImplementedError) or (
        isinstance(error, (RuntimeError, TypeError)) and re.search(r"\bmeta\b", str(error)) is not None
    )


def check_weights(expert: Expert, function: RowFunction, name: str) -> None:
    """Compare the header of an expert's weights file, if any, with the expert built by `without_weights`.

    Raises ConfigError, SpecMismatch, NotFound or DataLoss.
    """
    if function.module is None or expert.weights is None:
        return
    actual = {
        key: (shape, DTYPES.get(dtype, dtype)) for key, (shape, dtype) in describe_tensors(expert.weights).items()
    }
    expected = {key: (tuple(value.shape), value.dtype) for key, value in function.module.state_dict().items()}
    check_fit(actual, expected, f"{name}: weights {str(expert.weights)!r}")


def _input_spec(function: RowFunction) -> TensorSpec:
    declared = function.expert.input
    if declared.shape is not None or not isinstance(function.module, nn.Linear):
        return declared
    return TensorSpec((function.module.in_features,), declared.dtype)


def _output_spec(expert: Expert, answer: Tensor, name: str) -> TensorSpec:
    shape, dtype = tuple(answer.shape[1:]), dtype_name(answer.dtype)
    expert.output.check(shape, dtype, f"the answer of {name}")
    return TensorSpec(shape, expert.output.dtype or dtype)
