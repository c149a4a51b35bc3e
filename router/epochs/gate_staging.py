"""Stages a gate with new tensors beside the serving one, fully verified, or rejects the tensors.

Shapes: T rows, D features, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ...experts.errors import FailedPrecondition
from ...experts.spec import TensorSpec
from ...experts.staging.memory import within_memory
from ...experts.staging.refusals import refusals
from ...experts.staging.verify import Policy, check_applied, check_drift, check_norms, distance, golden_rows
from ...experts.weights.files import described, tensors_of
from ...experts.weights.inspect import check_described, norms_of, survey
from ..gates.base import Gate

OWNER = "gate"


def stage_gate(
    gate: Gate, tensors: Mapping[str, Tensor], policy: Policy, *, name: str = OWNER
) -> tuple[Gate, float | None]:
    """Copy a gate with new tensors and verify the copy; returns it with the drift of its scores on probe rows.

    The drift is None if the gate has no `in_features`, or if its own scores are not finite. The gate itself does not
    change. Error messages begin with `name`.

    Raises NotFound, DataLoss, SpecMismatch, FailedPrecondition or TooLarge.
    """

    def build() -> tuple[Gate, float | None]:
        before = tensors_of(gate)
        check_described(described(tensors), described(before), OWNER)
        contents = survey(tensors)
        check_norms(contents.norms, norms_of(before), policy)
        staged = copy.deepcopy(gate)
        staged.load_state_dict(dict(tensors), strict=False)  # the state of a scorer may hold more than tensors
        check_applied(tensors_of(staged), contents.digests)
        drift = _drift(staged, gate, policy)
        check_drift(drift, policy)
        return staged, drift

    with refusals(name, "gate", "the log of the router, and fix the scorer"):
        return within_memory(build, "cpu")


def _drift(staged: Gate, gate: Gate, policy: Policy) -> float | None:
    rows_TD = golden_rows(TensorSpec(None if gate.in_features is None else (gate.in_features,)), policy.probe_rows)
    if rows_TD is None:
        return None
    after_TE, before_TE = _scores(staged, rows_TD), _scores(gate, rows_TD)
    if after_TE.shape != before_TE.shape or after_TE.dtype != before_TE.dtype:
        raise FailedPrecondition(
            f"it scores probe rows with {list(after_TE.shape)} {after_TE.dtype}, the gate that it replaces with "
            f"{list(before_TE.shape)} {before_TE.dtype}: use weights of the same gate"
        )
    bad_rows = int((~after_TE.isfinite().all(dim=1)).sum())
    if bad_rows:
        raise FailedPrecondition(
            f"its scores of {bad_rows} of {len(rows_TD)} probe rows are NaN or infinite: check the training run, and "
            "the dtype of the weights for overflow"
        )
    with torch.inference_mode():
        staged.select(after_TE)
    return distance(after_TE, before_TE) if before_TE.isfinite().all() else None


def _scores(gate: Gate, rows_TD: Tensor) -> Tensor:
    parameter = next(gate.parameters(), rows_TD)
    with torch.inference_mode():
        return gate.scores(rows_TD.to(parameter.device)).cpu()
