"""Staging a gate: every kind takes tensors of its own kind, bad ones are rejected, the old gate does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.artefacts import bad_artefacts, sha256_of
from torch import Tensor, nn

from expertmesh.experts.errors import DataLoss, ExpertMeshError, FailedPrecondition, SpecMismatch, TooLarge
from expertmesh.experts.staging.refusals import refusals
from expertmesh.experts.staging.verify import Policy
from expertmesh.experts.weights.files import described, load_tensors, save_tensors, tensor_digest, tensors_of
from expertmesh.experts.weights.inspect import LIMITS, ArtefactLimits, inspect_artefact
from expertmesh.router import gates
from expertmesh.router.epochs.gate_staging import stage_gate
from expertmesh.router.gates import Gate

KINDS: dict[str, Gate] = {
    "top_k": gates.TopK(in_features=4, num_experts=3, k=2),
    "switch": gates.Switch(in_features=4, num_experts=3),
    "noisy": gates.NoisyTopK(in_features=4, num_experts=3),
    "sigmoid": gates.Sigmoid(in_features=4, num_experts=3, k=2),
    "threshold": gates.Threshold(in_features=4, num_experts=3),
    "top_p": gates.TopP(in_features=4, num_experts=3),
    "cosine": gates.Cosine(in_features=4, num_experts=3, k=2),
    "expert_choice": gates.ExpertChoice(in_features=4, num_experts=3),
    "custom": gates.Custom(nn.Linear(4, 3), num_experts=3, in_features=4),
    "fixed": gates.Fixed([0.25, 0.5, 0.25]),
}


def test_every_gate_is_staged_here() -> None:
    assert {type(gate) for gate in KINDS.values()} | {gates.Hash} == set(gates.GATES.values())


def moved(gate: Gate, by: float = 1.5) -> dict[str, Tensor]:
    return {
        name: value * by + 0.125 if value.is_floating_point() else value for name, value in gate.state_dict().items()
    }


def stage_file(
    gate: Gate,
    path: Path,
    policy: Policy,
    *,
    name: str = "gate",
    sha256: str | None = None,
    limits: ArtefactLimits = LIMITS,
) -> tuple[Gate, float | None]:
    """Stage what a file holds as a cluster does: the controller inspects it, the router gets its tensors."""
    wanted = described(tensors_of(gate))
    with refusals(name, "gate", "the log"):
        inspect_artefact(path, sha256=sha256, limits=limits, wanted=wanted, owner="gate")
    return stage_gate(gate, load_tensors(path)[0], policy, name=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_gate_takes_new_tensors_and_the_old_one_does_not_change(kind: str, in_file: bool, tmp_path: Path) -> None:
    gate = KINDS[kind].eval()
    before, new = tensor_digest(gate.state_dict()), moved(gate)
    save_tensors(tmp_path / "g", new)
    if in_file:
        staged, drift = stage_file(gate, tmp_path / "g", Policy(), sha256=sha256_of(tmp_path / "g"))
    else:
        staged, drift = stage_gate(gate, new, Policy())
    assert type(staged) is type(gate)
    assert tensor_digest(staged.state_dict()) == tensor_digest(new)
    assert tensor_digest(gate.state_dict()) == before
    assert staged.config() == gate.config() if kind not in ("custom", "fixed") else True
    assert drift is None if gate.in_features is None else drift is not None and drift > 0


def test_every_bad_artefact_is_rejected(tmp_path: Path) -> None:
    gate = KINDS["top_k"].eval()
    before = tensor_digest(gate.state_dict())
    for bad in bad_artefacts(tmp_path, dict(gate.state_dict())):
        with pytest.raises(ExpertMeshError) as caught:
            stage_file(gate, bad.path, Policy(max_drift=bad.max_drift), name="news/gate", sha256=bad.sha256)
        assert caught.value.code == bad.code, bad.name
        assert caught.value.message.startswith("news/gate: "), bad.name
        assert all(word in caught.value.message for word in bad.words), (bad.name, caught.value.message)
    assert tensor_digest(gate.state_dict()) == before


def test_a_gate_without_tensors_takes_none() -> None:
    gate = gates.Hash(num_experts=3)
    assert stage_gate(gate, {}, Policy())[1] is None
    with pytest.raises(SpecMismatch, match=r"^gate: it does not fit the gate: unexpected 'a'"):
        stage_gate(gate, {"a": torch.ones(1)}, Policy())


class Scorer(nn.Linear):
    """A scorer whose scores go bad with certain biases."""

    def forward(self, rows: Tensor) -> Tensor:
        kind = round(float(self.bias.sum()))
        if kind == 30:
            raise KeyError("a secret")
        if kind == 33:
            return torch.full((len(rows), 3), torch.nan)
        if kind == 36:
            raise MemoryError
        if kind == 39:
            return torch.ones(len(rows), 3, dtype=torch.float64)
        return super().forward(rows)


class IgnoresBias(nn.Linear):
    """A scorer that keeps its bias, whatever it loads."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({**state, f"{prefix}bias": self.bias}, prefix, *rest)


@pytest.mark.parametrize(
    ("bias", "kind", "words"),
    [
        (10.0, FailedPrecondition, "staging raised KeyError; see the log of the router"),
        (11.0, FailedPrecondition, "its scores of 8 of 8 probe rows are NaN or infinite"),
        (12.0, TooLarge, "ran out of memory"),
        (13.0, FailedPrecondition, r"scores probe rows with \[8, 3\] torch.float64"),
    ],
)
def test_a_scorer_that_breaks_with_its_new_weights_is_rejected(
    bias: float, kind: type[ExpertMeshError], words: str
) -> None:
    gate = gates.Custom(Scorer(4, 3), num_experts=3, in_features=4).eval()
    new = {"scorer.weight": torch.ones(3, 4), "scorer.bias": torch.full((3,), bias)}
    with pytest.raises(kind, match=f"^gate: .*{words}") as caught:
        stage_gate(gate, new, Policy())
    assert "secret" not in caught.value.message


def test_a_tensor_that_was_not_applied_is_data_loss() -> None:
    gate = gates.Custom(IgnoresBias(4, 3), num_experts=3, in_features=4)
    with pytest.raises(DataLoss, match=r"what was sent for 'scorer\.bias':"):
        stage_gate(gate, moved(gate), Policy())


def test_limits_and_policy_apply(tmp_path: Path) -> None:
    gate = KINDS["top_k"].eval()
    save_tensors(tmp_path / "g", moved(gate))
    with pytest.raises(TooLarge, match="max_bytes"):
        stage_file(gate, tmp_path / "g", Policy(), limits=ArtefactLimits(max_bytes=9))
    with pytest.raises(FailedPrecondition, match=r"max_drift is 0\.001"):
        stage_file(gate, tmp_path / "g", Policy(max_drift=0.001))
