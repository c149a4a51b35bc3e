"""Fitted weights: the best there are, within their constraints, and what a layer with them answers on unseen rows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from helpers.gate_samples import EXPERTS, SAMPLES, WIDTH, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import FeedForward, PackedExperts
from expertmesh.experts.transform.measure import answers_of
from expertmesh.experts.weights.files import tensor_digest
from expertmesh.router import gates
from expertmesh.router.mixture.fit_weights import dense_weights, fit_gate, fit_weights, mixture
from expertmesh.router.mixture.least_squares import least_squares
from expertmesh.router.mixture.local import LocalLayer

seeds = st.integers(0, 200)


def problem(experts: int, seed: int, dependent: bool = False) -> tuple[Tensor, Tensor]:
    """Answers [9, E, 2] and targets [9, 2], float64; `dependent`: two experts answer alike."""
    generator = torch.Generator().manual_seed(seed)
    answers_TE = torch.randn(9, experts, 2, generator=generator, dtype=torch.float64)
    if dependent and experts > 1:
        answers_TE[:, 1] = answers_TE[:, 0]
    return answers_TE, torch.randn(9, 2, generator=generator, dtype=torch.float64)


def error(answers_TE: Tensor, targets: Tensor, weights_E: Tensor, ridge: float = 0.0) -> float:
    found = torch.einsum("teo,e->to", answers_TE, weights_E)
    return float((found - targets).square().mean() + ridge * weights_E.square().sum())


def design(answers_TE: Tensor) -> Tensor:
    return answers_TE.movedim(1, -1).reshape(-1, answers_TE.shape[1])


@given(st.integers(1, 5), st.sampled_from([0.0, 0.1, 10.0]), st.booleans(), st.booleans(), seeds)
@settings(max_examples=60)
def test_least_squares_are_where_the_slope_is_zero(
    experts: int, ridge: float, sum_to_one: bool, dependent: bool, seed: int
) -> None:
    answers_TE, targets = problem(experts, seed, dependent)
    weights_E = least_squares(design(answers_TE), targets.reshape(-1), ridge=ridge, sum_to_one=sum_to_one)
    moved_E = weights_E.clone().requires_grad_()
    found = torch.einsum("teo,e->to", answers_TE, moved_E)
    ((found - targets).square().mean() + ridge * moved_E.square().sum()).backward()
    assert moved_E.grad is not None
    slope_E = moved_E.grad - (moved_E.grad.mean() if sum_to_one else 0)
    torch.testing.assert_close(slope_E, torch.zeros(experts, dtype=torch.float64), atol=1e-9, rtol=0)
    if sum_to_one:
        assert float(weights_E.sum()) == pytest.approx(1)
    if dependent and experts > 1:
        assert float(weights_E[0]) == pytest.approx(float(weights_E[1]), abs=1e-9)  # the least norm


@given(st.integers(1, 5), st.sampled_from([0.0, 0.1]), st.booleans(), seeds)
@settings(max_examples=80)
def test_the_active_set_finds_the_best_of_all_subsets(experts: int, ridge: float, sum_to_one: bool, seed: int) -> None:
    answers_TE, targets = problem(experts, seed)
    options: dict[str, Any] = {"ridge": ridge, "sum_to_one": sum_to_one}
    found_E = least_squares(design(answers_TE), targets.reshape(-1), nonnegative=True, **options)
    assert bool((found_E >= 0).all())
    if sum_to_one:
        assert float(found_E.sum()) == pytest.approx(1)
    errors = [] if sum_to_one else [error(answers_TE, targets, torch.zeros(experts, dtype=torch.float64))]
    for size in range(1, experts + 1):
        for subset in itertools.combinations(range(experts), size):
            weights_E = torch.zeros(experts, dtype=torch.float64)
            weights_E[list(subset)] = least_squares(design(answers_TE[:, subset]), targets.reshape(-1), **options)
            if bool((weights_E >= 0).all()):
                errors.append(error(answers_TE, targets, weights_E, ridge))
    assert error(answers_TE, targets, found_E, ridge) == pytest.approx(min(errors), rel=1e-9)


@given(st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]), seeds)
@settings(max_examples=40)
def test_fitted_rows_are_never_worse_than_with_equal_weights(
    experts: int, nonnegative: bool, sum_to_one: bool, held_out: float, seed: int
) -> None:
    answers_TE, targets = problem(experts, seed)
    gate, report = fit_weights(
        answers_TE, targets, nonnegative=nonnegative, sum_to_one=sum_to_one, held_out=held_out, seed=seed
    )
    assert (report.fitted_loss.after or 0) <= (report.fitted_loss.before or 0) + 1e-6
    assert report.held_out_rows == round(9 * held_out)
    assert (report.held_out_loss.after is None) == (held_out == 0)
    assert [change.after for change in report.weights.values()] == pytest.approx(gate.weights_E.tolist())


def test_s2_weights_are_determined_from_data_and_evaluated() -> None:
    """The four steps: experts, weights fitted to data, the weighted sum as a layer, and its error on unseen rows."""
    experts = [torch.sin, torch.cos, torch.tanh]
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    y = 0.7 * torch.sin(x) - 1.5 * torch.cos(x) + 0.25 * torch.tanh(x)
    gate, report = fit_weights(answers_of(experts, x), y)
    assert gate.weights_E.tolist() == pytest.approx([0.7, -1.5, 0.25], abs=1e-4)
    unseen = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    wanted = 0.7 * torch.sin(unseen) - 1.5 * torch.cos(unseen) + 0.25 * torch.tanh(unseen)
    torch.testing.assert_close(LocalLayer(gate, experts)(unseen), wanted, atol=1e-4, rtol=1e-4)
    assert (report.held_out_loss.after or 0) < 1e-8 < (report.held_out_loss.before or 0)
    assert (report.fitted_rows, report.held_out_rows) == (240, 60)
    text = str(report)
    assert text.startswith("loss mse, fitted rows 240, held out rows 60")
    assert any(line.startswith("weights: 1 ") and line.endswith("-1.5") for line in text.splitlines())
    assert json.loads(json.dumps(report.as_dict()))["weights"]["0"]["before"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("sum_to_one", [False, True])
def test_cross_entropy_is_descended_to_where_its_slope_is_zero(sum_to_one: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    answers_TEC = torch.randn(200, 3, 4, generator=generator, dtype=torch.float64)
    noisy_TC = 2 * answers_TEC[:, 0] + torch.randn(200, 4, generator=generator)
    labels_T = noisy_TC.argmax(dim=1)
    gate, report = fit_weights(answers_TEC, labels_T, loss="cross_entropy", sum_to_one=sum_to_one, held_out=0)
    weights_E = gate.weights_E.double().requires_grad_()
    F.cross_entropy(torch.einsum("tec,e->tc", answers_TEC, weights_E), labels_T).backward()
    assert weights_E.grad is not None
    slope_E = weights_E.grad - (weights_E.grad.mean() if sum_to_one else 0)
    assert float(slope_E.abs().max()) < 1e-5
    if sum_to_one:
        assert float(gate.weights_E.sum()) == pytest.approx(1)
    assert report.fitted_accuracy is not None
    assert (report.fitted_accuracy.after or 0) > (report.fitted_accuracy.before or 0) + 0.1
    assert report.held_out_accuracy is None
    alone, _ = fit_weights(answers_TEC[:, :1], labels_T, loss="cross_entropy", sum_to_one=True)
    assert alone.weights_E.tolist() == [1.0]


def test_separable_labels_leave_the_weights_finite() -> None:
    labels_T = torch.arange(40) % 4
    answers_TEC = torch.stack([F.one_hot(labels_T, 4).float(), torch.zeros(40, 4)], dim=1)
    gate, report = fit_weights(answers_TEC, labels_T, loss="cross_entropy")
    assert bool(gate.weights_E.isfinite().all())
    assert (report.held_out_loss.after or 0) < 0.01
    small, _ = fit_weights(answers_TEC, labels_T, loss="cross_entropy", ridge=0.1)
    assert float(small.weights_E.abs().max()) < float(gate.weights_E.abs().max())


def specialists() -> tuple[list[Any], Tensor, Tensor]:
    """Two experts, each right on its own half of the rows."""
    experts = [lambda x: x, lambda x: -x]
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    return experts, x, torch.where(x[:, :1] > 0, x, -x)


def test_s2_a_gate_learns_which_expert_is_right() -> None:
    experts, x, y = specialists()
    torch.manual_seed(0)
    gate = gates.TopK(3, 2, k=1, softmax="before", renormalize=False)
    before = tensor_digest(gate.state_dict())
    fitted, report = fit_gate(gate, experts, x, y, epochs=40, learning_rate=0.1)
    assert tensor_digest(gate.state_dict()) == before
    assert not fitted.training
    assert (report.held_out_loss.after or 0) < 0.2 * (report.held_out_loss.before or 0)
    again, _ = fit_gate(gate, experts, x, y, epochs=40, learning_rate=0.1)
    assert tensor_digest(again.state_dict()) == tensor_digest(fitted.state_dict())
    unseen = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    right = fitted(unseen).indices_TK[:, 0] == (unseen[:, 0] <= 0).long()
    assert float(right.float().mean()) > 0.9
    weights = [change.after or 0 for change in report.weights.values()]
    assert sum(weights) <= 1


def test_experts_that_are_not_chosen_learn_through_the_mixture_of_all() -> None:
    """The weight of a single expert is one whatever its score: only the second term of the loss trains such a gate."""
    experts, x, y = specialists()
    torch.manual_seed(0)
    _, report = fit_gate(gates.TopK(3, 2, k=1), experts, x, y, epochs=40, learning_rate=0.1)
    assert (report.held_out_loss.after or 0) < 0.2 * (report.held_out_loss.before or 0)


def test_the_report_is_of_what_the_layer_answers() -> None:
    torch.manual_seed(0)
    x, labels_T = rows(90), torch.arange(90) % 3
    experts = [FeedForward(WIDTH, 4, out_features=3) for _ in range(EXPERTS)]
    before = [tensor_digest(expert.state_dict()) for expert in experts]
    fitted, report = fit_gate(make("top_k"), experts, x, labels_T, loss="cross_entropy", held_out=0, epochs=2)
    assert [tensor_digest(expert.state_dict()) for expert in experts] == before
    assert all(parameter.grad is None for expert in experts for parameter in expert.parameters())
    output = LocalLayer(fitted, experts)(x).detach()
    assert report.fitted_loss.after == pytest.approx(float(F.cross_entropy(output, labels_T)), rel=1e-5)
    assert report.fitted_accuracy is not None
    assert report.fitted_accuracy.after == pytest.approx(float((output.argmax(1) == labels_T).float().mean()))


@pytest.mark.parametrize("sample", [name for name in SAMPLES if name not in ("hash", "fixed")])
def test_every_trainable_gate_can_be_fitted(sample: str) -> None:
    gate, x = make(sample), rows(60)
    experts = PackedExperts(EXPERTS, WIDTH, 4)
    answers_TE = answers_of(experts, x)
    layer = LocalLayer(gate, experts)
    torch.testing.assert_close(mixture(answers_TE, dense_weights(gate(x), EXPERTS)), layer(x), rtol=1e-4, atol=1e-5)
    fitted, report = fit_gate(gate, experts, x, torch.randn(60, WIDTH), epochs=3, batch_rows=16, held_out=0)
    assert type(fitted) is type(gate)
    assert tensor_digest(fitted.state_dict()) != tensor_digest(gate.state_dict())
    assert (report.fitted_loss.after or 0) > 0


def test_a_gate_may_read_other_rows_than_the_experts() -> None:
    experts, x, y = specialists()
    gate = gates.TopK(1, 2, k=2)
    fitted, report = fit_gate(gate, experts, x, y, gate_input=x[:, :1], learning_rate=0.1, epochs=10)
    assert fitted.in_features == 1
    assert (report.held_out_loss.after or 0) < (report.held_out_loss.before or 0)


ANSWERS, TARGETS, LABELS = torch.zeros(6, 2, 3), torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("answers", "targets", "options", "kind", "message"),
    [
        (ANSWERS, TARGETS, {"loss": "mae"}, ConfigError, "loss is 'mae', but must be one of mse, cross_entropy"),
        (ANSWERS, TARGETS, {"held_out": 1.0}, ConfigError, "held_out must be a share of at least 0 and below 1"),
        (ANSWERS, TARGETS, {"ridge": -1.0}, ConfigError, "got 0.2 and -1.0"),
        (ANSWERS, LABELS, {"loss": "cross_entropy", "nonnegative": True}, ConfigError, "nonnegative is for loss 'mse'"),
        (ANSWERS.long(), TARGETS, {}, SpecMismatch, r"answers are \[6, 2, 3\] torch.int64, but loss 'mse'"),
        (ANSWERS[:0], TARGETS[:0], {}, SpecMismatch, r"of shape \[rows, experts, \.\.\.\]"),
        (ANSWERS[0, 0], TARGETS, {}, SpecMismatch, r"answers are \[3\]"),
        (ANSWERS, TARGETS[:5], {}, SpecMismatch, r"targets are \[5, 3\] .* values of shape \[6, 3\]"),
        (ANSWERS, TARGETS, {"loss": "cross_entropy"}, SpecMismatch, r"must be int64 labels of shape \[6\]"),
        (ANSWERS, LABELS + 3, {"loss": "cross_entropy"}, SpecMismatch, "labels lie between 3 and 3, but"),
        (ANSWERS / 0, TARGETS, {}, SpecMismatch, "answers or targets have NaN or infinite values"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(answers: Any, targets: Any, options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fit_weights(answers, targets, **options)


@pytest.mark.parametrize(
    ("gate", "options", "kind", "message"),
    [
        (gates.Hash(2), {}, ConfigError, "gate 'hash' has no trainable parameters: fit_weights"),
        (gates.TopK(3, 3), {}, ConfigError, "the gate chooses among 3 experts, but 2 are given"),
        (gates.TopK(3, 2, k=1), {"all_experts": 0}, ConfigError, "no gradient reaches gate 'top_k'"),
        (gates.TopK(3, 2), {"epochs": 0}, ConfigError, "got epochs=0"),
        (gates.TopK(3, 2), {"gate_input": torch.zeros(2, 3)}, SpecMismatch, "gate_input has 2 rows, but x has 400"),
        (gates.TopK(4, 2), {}, SpecMismatch, "rows have 3 features"),
    ],
)
def test_a_gate_that_cannot_be_fitted_is_refused(gate: Any, options: Any, kind: type[Exception], message: str) -> None:
    experts, x, y = specialists()
    with pytest.raises(kind, match=message):
        fit_gate(gate, experts, x, y, **options)


def test_answers_of_experts_that_do_not_fit_together() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ConfigError, match="there are no experts"):
        answers_of([], x)
    with pytest.raises(SpecMismatch, match=r"differ in shape or dtype: \[4, 3\] torch.float32, \[4, 2\] torch.float32"):
        answers_of([torch.sin, nn.Linear(3, 2)], x)
    with pytest.raises(SpecMismatch, match=r"an expert returned \[3\] for 4 rows"):
        answers_of([lambda x: x[0]], x)
    dropping = nn.Sequential(nn.Dropout(0.5), nn.Identity().eval())
    assert torch.equal(answers_of([dropping], x + 1)[:, 0], x + 1)
    assert (dropping[0].training, dropping[1].training) == (True, False)


def test_s9_a_torch_model_of_100_to_10_classes_trains_with_adam() -> None:
    """Two sub-models of 100 → 50 → 10 under one gate, 100 epochs: the loss falls, and unseen rows are classified."""
    torch.manual_seed(0)
    y_T, unseen_T = torch.arange(320) % 10, torch.arange(100) % 10
    centres = 3 * torch.randn(10, 100)
    x, unseen = centres[y_T] + torch.randn(320, 100), centres[unseen_T] + torch.randn(100, 100)
    model = LocalLayer(gates.TopK(100, 2, k=2), [FeedForward(100, 50, out_features=10) for _ in range(2)])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y_T)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert float((model(unseen).argmax(dim=1) == unseen_T).float().mean()) > 0.95
