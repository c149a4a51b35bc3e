"""Share what experts have in common: hidden units that are equal in all of them move to one that is always on.

Shapes: R rows, D features, F hidden units, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError, SpecMismatch
from ..tensors import byte_view
from .feed_forward import FeedForwardExpert, check_alike, check_feed_forward, unit_parameters, with_units
from .measure import answers, answers_of, output_error, parameters
from .report import Change, Report


@dataclass(frozen=True, kw_only=True)
class ShareReport(Report):
    """Experts before, and the shared expert and the rests after.

    `hidden_units` and `parameters` are those of all experts together; `parameters_per_row` those that a row of one
    expert, and then of the shared one and one rest, is computed with. `relative_l2` and `max_abs` (see `OutputError`)
    compare the mean of all experts before and after, on the rows; None without rows.
    """

    experts: int
    shared_units: int
    shared_output_bias: bool
    hidden_units: Change
    parameters: Change
    parameters_per_row: Change
    relative_l2: float | None = None
    max_abs: float | None = None


def share(
    experts: Sequence[FeedForwardExpert], *, rows: Tensor | None = None
) -> tuple[FeedForwardExpert, list[FeedForwardExpert], ShareReport]:
    """The shared expert, what is left of each expert, and the report.

    A hidden unit is common if its input weights, its biases and its output column are equal in every expert, bit for
    bit, wherever it stands; so is the output bias. shared(x) + Σ wᵢ·restᵢ(x) equals Σ wᵢ·fᵢ(x) up to rounding on the
    precondition that the weights of each row sum to one, as after a renormalised softmax; a gate whose weights do not,
    or that drops rows, gives something else. Every rest keeps at least one unit.

    Raises ConfigError for fewer than two experts, what is no feed-forward expert, and experts with nothing in common;
    SpecMismatch for experts of different classes, activation functions, widths, biases or dtypes.
    """
    if len(experts) < 2:
        raise ConfigError(f"{len(experts)} experts are given, but sharing needs at least two")
    check_feed_forward(*experts)
    check_alike(experts)
    _check_widths(experts)
    keys = [_keys(expert) for expert in experts]
    common = _common(keys, most=min(len(units) for units in keys) - 1)
    if not common:
        raise ConfigError(
            f"the {len(experts)} experts have no hidden unit in common that can be shared: sharing is for experts that "
            "were made from one model and kept a part of it"
        )
    biases = [expert.down_proj.bias for expert in experts]
    same_bias = biases[0] is not None and len({bytes(byte_view(bias)) for bias in biases}) == 1
    zero = None if biases[0] is None else torch.zeros_like(biases[0].detach())
    taken = [_positions(units, common) for units in keys]
    shared = with_units(experts[0], taken[0][0], biases[0] if same_bias else zero)
    rests = [
        with_units(expert, left, zero if same_bias else bias)
        for expert, (_, left), bias in zip(experts, taken, biases, strict=True)
    ]
    return shared, rests, _report(experts, shared, rests, same_bias, rows)


def _check_widths(experts: Sequence[FeedForwardExpert]) -> None:
    def kind(expert: FeedForwardExpert) -> tuple[int, int, bool, torch.dtype]:
        up, down = expert.up_proj, expert.down_proj
        return up.in_features, down.out_features, down.bias is not None, up.weight.dtype

    for index, expert in enumerate(experts):
        if kind(expert) != kind(experts[0]):
            raise SpecMismatch(
                f"experts 0 and {index} differ in inputs, outputs, bias or dtype: {kind(experts[0])} and {kind(expert)}"
            )


def _keys(expert: FeedForwardExpert) -> list[bytes]:
    """The bytes of all parameters of each hidden unit."""
    return [bytes(byte_view(unit)) for unit in unit_parameters(expert)]


def _common(keys: Sequence[Sequence[bytes]], most: int) -> Counter[bytes]:
    """How often each unit stands in every expert; of all of these at most `most`, in the order of the first expert."""
    counts = Counter(keys[0])
    for units in keys[1:]:
        counts &= Counter(units)
    return Counter(list(counts.elements())[:most])


def _positions(keys: Sequence[bytes], common: Counter[bytes]) -> tuple[Tensor, Tensor]:
    """Where an expert has its common units, and where all others."""
    wanted, taken = Counter(common), []
    for position, key in enumerate(keys):
        if wanted[key]:
            wanted[key] -= 1
            taken.append(position)
    left = sorted(set(range(len(keys))) - set(taken))
    return torch.tensor(taken), torch.tensor(left)


def _report(
    experts: Sequence[FeedForwardExpert],
    shared: FeedForwardExpert,
    rests: Sequence[FeedForwardExpert],
    same_bias: bool,
    rows: Tensor | None,
) -> ShareReport:
    def units(some: Sequence[FeedForwardExpert]) -> int:
        return sum(expert.up_proj.out_features for expert in some)

    report = ShareReport(
        experts=len(experts),
        shared_units=shared.up_proj.out_features,
        shared_output_bias=same_bias,
        hidden_units=Change(units(experts), units([shared, *rests])),
        parameters=Change(parameters(*experts), parameters(shared, *rests)),
        parameters_per_row=Change(parameters(experts[0]), parameters(shared, rests[0])),
    )
    if rows is None:
        return report
    before = answers_of(experts, rows).double().mean(dim=1)
    after = answers_of(rests, rows).double().mean(dim=1) + answers(shared, rows).double()
    error = output_error(before, after)
    return replace(report, relative_l2=error.relative_l2, max_abs=error.max_abs)
