"""Fit the weights of frozen experts to data: the same for every row in closed form or by descent, or those of a gate.

Shapes: T rows, E experts, C classes, N values (rows times values per row).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experts.errors import ConfigError, SpecMismatch
from ...experts.modules import PackedExperts
from ...experts.transform.measure import RowsFunction, answers_of
from ...experts.transform.report import Change, Report
from ..gates import Fixed, Gate, Routing
from .least_squares import least_squares, zero_sum_directions

LOSSES = ("mse", "cross_entropy")


@dataclass(frozen=True, kw_only=True)
class FitReport(Report):
    """Losses with equal weights of 1 / E before, and with the fitted weights after.

    `fitted_loss` and `held_out_loss` are means over the rows that were fitted and those that were held out (None if
    there are none); with "cross_entropy" the accuracies are the shares of rows whose label has the highest score.
    `weights` are those of each expert, by index; those of a gate are means over the fitted rows.
    """

    loss: str
    fitted_rows: int
    held_out_rows: int
    fitted_loss: Change
    held_out_loss: Change
    fitted_accuracy: Change | None = None
    held_out_accuracy: Change | None = None
    weights: Mapping[str, Change] = field(default_factory=dict)


def fit_weights(
    answers_TE: Tensor,
    targets: Tensor,
    *,
    loss: str = "mse",
    ridge: float = 0.0,
    nonnegative: bool = False,
    sum_to_one: bool = False,
    held_out: float = 0.2,
    seed: int = 0,
) -> tuple[Fixed, FitReport]:
    """Weights w of y = Σ wᵢ·fᵢ(x), the same for every row, as a `Fixed` gate, and the report.

    `answers_TE` [T, E, ...] are the experts' answers (see `answers_of`). With "mse", `targets` are [T, ...] and the
    weights least squares in closed form; `ridge`·‖w‖² is added to the mean squared error. With `nonnegative` they are
    the best of those that are not negative, by an active set. With "cross_entropy", answers are logits [T, E, C],
    `targets` int64 labels [T], and the loss, which is convex in w, is descended by L-BFGS. `sum_to_one` keeps Σ w = 1.
    The share `held_out` of the rows, drawn with the `seed`, is not fitted. Computed in float64 on the CPU.

    Raises ConfigError for an unknown loss and options out of range; SpecMismatch for shapes, dtypes or labels that do
    not fit, and values that are not finite.
    """
    _check_options(loss, held_out, ridge)
    if nonnegative and loss != "mse":
        raise ConfigError(f"nonnegative is for loss 'mse', not {loss!r}: leave it out")
    _check_data(answers_TE, targets, loss)
    split = _Rows.draw(len(targets), held_out, seed)
    wide_TE = answers_TE.detach().cpu().double()
    wanted_T = targets.detach().cpu() if loss == "cross_entropy" else targets.detach().cpu().double()
    some_TE, some_T = wide_TE[split.fitted], wanted_T[split.fitted]
    if loss == "mse":
        design_NE = some_TE.movedim(1, -1).reshape(-1, some_TE.shape[1])
        weights_E = least_squares(
            design_NE, some_T.reshape(-1), ridge=ridge, nonnegative=nonnegative, sum_to_one=sum_to_one
        )
    else:
        weights_E = _descended(some_TE, some_T, ridge, sum_to_one)
    gate = Fixed(weights_E.tolist())
    return gate, _report(wide_TE, wanted_T, gate.weights_E.double().expand(len(targets), -1), split, loss)


def fit_gate(
    gate: Gate,
    experts: PackedExperts | Sequence[RowsFunction],
    x: Tensor,
    targets: Tensor,
    *,
    loss: str = "mse",
    gate_input: Tensor | None = None,
    epochs: int = 30,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    batch_rows: int = 128,
    all_experts: float = 1.0,
    held_out: float = 0.2,
    seed: int = 0,
) -> tuple[Gate, FitReport]:
    """A copy of a trainable gate, fitted by AdamW while the experts are frozen, and the report.

    `x` [T, ...] are rows, `targets` as in `fit_weights`; the gate reads `gate_input` [T, ...], by default `x`. The loss
    is that of the experts that the gate chooses, plus `all_experts` times that of all experts under the same gate
    (k = E), so that experts which are not chosen learn too; a gate whose k cannot be set has the first term only. The
    same seed gives the same gate. It comes back in evaluation mode; its capacity, if any, is that of the layer.

    Raises ConfigError for a gate that has nothing to train or that no gradient reaches, another number of experts and
    options out of range; SpecMismatch for shapes, dtypes or labels that do not fit, and values that are not finite.
    """
    _check_options(loss, held_out, weight_decay)
    if epochs < 1 or batch_rows < 1 or not learning_rate > 0 or not all_experts >= 0:
        raise ConfigError(
            "epochs and batch_rows must be at least 1, learning_rate above 0 and all_experts 0 or more; got "
            f"epochs={epochs}, batch_rows={batch_rows}, learning_rate={learning_rate}, all_experts={all_experts}"
        )
    answers_TE = answers_of(experts, x)
    if answers_TE.shape[1] != gate.num_experts:
        raise ConfigError(f"the gate chooses among {gate.num_experts} experts, but {answers_TE.shape[1]} are given")
    _check_data(answers_TE, targets, loss)
    answers_TE = answers_TE if answers_TE.dtype == torch.float64 else answers_TE.float()
    seen = x if gate_input is None else gate_input
    if len(seen) != len(x):
        raise SpecMismatch(f"gate_input has {len(seen)} rows, but x has {len(x)}: give one for each")
    fitted = copy.deepcopy(gate).train()
    trainable = [parameter for parameter in fitted.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(f"gate {gate.name!r} has no trainable parameters: fit_weights fits weights without a gate")
    split = _Rows.draw(len(targets), held_out, seed)
    optimiser = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    reached = False
    with torch.random.fork_rng(devices=[]):  # gates with noise draw from the global generator
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.split(split.fitted[torch.randperm(len(split.fitted))], batch_rows):
                optimiser.zero_grad()
                total = _gate_loss(fitted, seen[rows], answers_TE[rows], targets[rows], loss, all_experts)
                if total.requires_grad:
                    torch.autograd.backward(total)
                    optimiser.step()
                reached = reached or any(p.grad is not None and bool(p.grad.any()) for p in trainable)
    if not reached:
        raise ConfigError(
            f"no gradient reaches gate {gate.name!r}: its weights do not depend on its scores (one expert per row and "
            "softmax='after': use softmax='before' with renormalize=False, a larger k, or all_experts above 0), or all "
            "experts answer alike"
        )
    fitted.eval()
    with torch.no_grad():
        weights_TE = dense_weights(fitted(seen), gate.num_experts)
    return fitted, _report(answers_TE, targets, weights_TE, split, loss)


def mixture(answers_TE: Tensor, weights_TE: Tensor) -> Tensor:
    """Σ wᵢ·fᵢ of each row: [T, ...] from answers [T, E, ...] and weights [T, E]."""
    return torch.einsum("te...,te->t...", answers_TE, weights_TE.to(answers_TE.dtype))


def dense_weights(routing: Routing, num_experts: int) -> Tensor:
    """The gate weight of every expert for every row [T, E], 0 for those that are not chosen; differentiable."""
    weights_TK = routing.weights_TK
    zero_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts)
    return zero_TE.scatter_add(1, routing.indices_TK.clamp(min=0), weights_TK)


@dataclass(frozen=True)
class _Rows:
    """Which rows are fitted, and which are held out."""

    fitted: Tensor
    held_out: Tensor

    @classmethod
    def draw(cls, count: int, held_out: float, seed: int) -> _Rows:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = count - min(round(count * held_out), count - 1)
        return cls(order[:kept], order[kept:])


def _descended(answers_TEC: Tensor, labels_T: Tensor, ridge: float, sum_to_one: bool) -> Tensor:
    """Weights [E] that minimise the cross-entropy, from equal ones."""
    count = answers_TEC.shape[1]
    start_E = torch.full((count,), 1 / count, dtype=torch.float64)
    directions_EF = zero_sum_directions(count) if sum_to_one else torch.eye(count, dtype=torch.float64)
    steps_F = torch.zeros(directions_EF.shape[1], dtype=torch.float64, requires_grad=True)
    if directions_EF.shape[1] == 0:
        return start_E
    optimiser = torch.optim.LBFGS([steps_F], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        weights_E = start_E + directions_EF @ steps_F
        loss = F.cross_entropy(torch.einsum("tec,e->tc", answers_TEC, weights_E), labels_T)
        loss = loss + ridge * weights_E.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return (start_E + directions_EF @ steps_F).detach()


def _gate_loss(gate: Gate, rows: Tensor, answers_TE: Tensor, targets: Tensor, loss: str, all_experts: float) -> Tensor:
    scores_TE = gate.scores(rows)
    chosen_TE = dense_weights(gate.select(scores_TE), gate.num_experts)
    total = _loss(mixture(answers_TE, chosen_TE), targets, loss)
    if all_experts and gate.k_per_request:
        all_TE = dense_weights(gate.select(scores_TE, k=gate.num_experts), gate.num_experts)
        total = total + all_experts * _loss(mixture(answers_TE, all_TE), targets, loss)
    return total


def _loss(output: Tensor, targets: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return F.mse_loss(output, targets.to(output.dtype))
    return F.cross_entropy(output, targets)


def _report(answers_TE: Tensor, targets: Tensor, weights_TE: Tensor, split: _Rows, loss: str) -> FitReport:
    count = answers_TE.shape[1]
    equal = mixture(answers_TE, answers_TE.new_full(answers_TE.shape[:2], 1 / count))
    outputs = equal, mixture(answers_TE, weights_TE)

    def losses(rows: Tensor) -> Change:
        if not len(rows):
            return Change(None, None)
        before, after = (float(_loss(output[rows].double(), targets[rows], loss)) for output in outputs)
        return Change(before, after)

    def accuracies(rows: Tensor) -> Change | None:
        if loss != "cross_entropy" or not len(rows):
            return None
        before, after = (float((y[rows].argmax(dim=1) == targets[rows]).double().mean()) for y in outputs)
        return Change(before, after)

    means = weights_TE[split.fitted].double().mean(dim=0).tolist()
    return FitReport(
        loss=loss,
        fitted_rows=len(split.fitted),
        held_out_rows=len(split.held_out),
        fitted_loss=losses(split.fitted),
        held_out_loss=losses(split.held_out),
        fitted_accuracy=accuracies(split.fitted),
        held_out_accuracy=accuracies(split.held_out),
        weights={str(index): Change(1 / count, weight) for index, weight in enumerate(means)},
    )


def _check_options(loss: str, held_out: float, penalty: float) -> None:
    if loss not in LOSSES:
        raise ConfigError(f"loss is {loss!r}, but must be one of {', '.join(LOSSES)}")
    if not 0 <= held_out < 1 or not 0 <= penalty < float("inf"):
        raise ConfigError(
            f"held_out must be a share of at least 0 and below 1, and ridge or weight_decay 0 or more; "
            f"got {held_out} and {penalty}"
        )


def _check_data(answers_TE: Tensor, targets: Tensor, loss: str) -> None:
    shape, labels = list(answers_TE.shape), loss == "cross_entropy"
    if answers_TE.dim() < 2 or 0 in shape or not answers_TE.is_floating_point() or (labels and len(shape) != 3):
        wanted = "[rows, experts, classes]" if labels else "[rows, experts, ...]"
        raise SpecMismatch(f"answers are {shape} {answers_TE.dtype}, but loss {loss!r} needs floats of shape {wanted}")
    expected = shape[:1] if labels else [shape[0], *shape[2:]]
    if list(targets.shape) != expected or (labels and targets.dtype != torch.int64):
        kind = "int64 labels" if labels else "values"
        raise SpecMismatch(f"targets are {list(targets.shape)} {targets.dtype}, but must be {kind} of shape {expected}")
    if labels and not 0 <= int(targets.min()) <= int(targets.max()) < shape[2]:
        raise SpecMismatch(
            f"labels lie between {int(targets.min())} and {int(targets.max())}, but answers have {shape[2]} classes"
        )
    if not answers_TE.isfinite().all() or not targets.isfinite().all():
        raise SpecMismatch("answers or targets have NaN or infinite values: leave those rows out")
