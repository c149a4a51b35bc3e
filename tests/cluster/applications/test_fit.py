"""The training loop of applications goes on where it was stopped, and ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh.cluster.applications import fit as loop
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import factor_of, fit
from expertmesh.experts.errors import DataLoss, FailedPrecondition


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 1))


def loss_of(own: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    loss: Tensor = F.mse_loss(own(x), x.sum(dim=1, keepdim=True))
    return loss


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = model()
    fit(wanted, lambda step: loss_of(wanted, step), steps=40, lr=0.01, checkpoint=tmp_path / "whole.safetensors")
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    path, stopped = tmp_path / "stopped.safetensors", model()

    def interrupted(step: int) -> Tensor:
        if step == 25:
            raise KeyboardInterrupt
        return loss_of(stopped, step)

    with pytest.raises(KeyboardInterrupt):
        fit(stopped, interrupted, steps=40, lr=0.01, checkpoint=path)
    found, seen = model(), []

    def noted(step: int) -> Tensor:
        seen.append(step)
        return loss_of(found, step)

    fit(found, noted, steps=40, lr=0.01, checkpoint=path)
    assert seen == list(range(25, 40))
    pairs = zip(found.parameters(), wanted.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)
    seconds = fit(found, noted, steps=40, lr=0.01, checkpoint=path)
    assert seen == list(range(25, 40))  # it is done
    assert seconds > 0


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    own = model()
    with pytest.raises(FailedPrecondition, match="the loss of it is nan at step 3"):
        fit(
            own,
            lambda step: loss_of(own, step) * (float("nan") if step == 3 else 1.0),
            steps=9,
            lr=0.01,
            checkpoint=tmp_path / "it.safetensors",
        )


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path, own, other = tmp_path / "it.safetensors", model(), nn.Linear(4, 1)
    fit(own, lambda step: loss_of(own, step), steps=2, lr=0.01, checkpoint=path)
    with pytest.raises(DataLoss, match="is of another model, or damaged"):
        fit(other, lambda step: loss_of(other, step), steps=2, lr=0.01, checkpoint=path)


def test_the_rate_rises_and_falls() -> None:
    factors = [factor_of(step, 100) for step in range(100)]
    top = factors.index(max(factors))
    assert factors[top] == 1.0
    assert factors == sorted(factors[: top + 1]) + sorted(factors[top + 1 :], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_costs_are_counted() -> None:
    own, x = nn.Linear(4, 8), torch.zeros(3, 4)
    assert parameters(own, own) == 2 * 40
    assert flops_of(lambda: own(x), rows=3) == 2 * 4 * 8
    times = iter([0.0, 0.5, 1.5, 2.0, 2.0])
    assert rate_of(lambda: 10, seconds=1.0, clock=lambda: next(times)) == 10.0
