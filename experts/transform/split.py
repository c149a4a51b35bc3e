"""Split a dense feed-forward network into experts whose answers sum to its own.

Shapes: R rows, D features, F hidden units, E experts, K experts per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, SpecMismatch
from ..training.k_means import k_means
from .feed_forward import FeedForwardExpert, check_feed_forward, hidden_values, with_units
from .measure import answers, answers_of, output_error, parameters
from .report import Change, Report

WAYS = ("blocks", "activations")


@dataclass(frozen=True, kw_only=True)
class SplitReport(Report):
    """A dense network and its experts, before and after.

    `hidden_units` and `parameters` are those of the dense network and of one expert; `all_parameters` those of all
    experts together, more than before by the output biases. `relative_l2` and `max_abs` (see `OutputError`) compare the
    sum of all experts with the dense output on the rows, and `relative_l2_of_k` the sum of the `k` experts of each row
    whose answers have the largest norm: what a gate may hope for. None where it was not measured.
    """

    by: str
    experts: int
    hidden_units: Change
    parameters: Change
    all_parameters: Change
    relative_l2: float | None = None
    max_abs: float | None = None
    k: int | None = None
    relative_l2_of_k: float | None = None


def split(
    dense: FeedForwardExpert,
    num_experts: int,
    *,
    by: str = "blocks",
    rows: Tensor | None = None,
    k: int | None = None,
    seed: int = 0,
) -> tuple[list[FeedForwardExpert], SplitReport]:
    """E experts of F / E hidden units each, whose sum (gate weights of one) is the dense output up to rounding.

    `by="blocks"` takes hidden units in their order; `by="activations"` puts units together that are active on the same
    `rows` [R, D]: balanced k-means over their hidden values, each unit's scaled to length one (the idea of MoEfication,
    Zhang et al. 2022, which clusters weights). Each expert has 1 / E of the output bias. A gate whose weights sum to
    one gives the mean of the experts: scale it by E.

    Raises ConfigError for what is no feed-forward expert, an unknown way, one that lacks rows, or `k` out of range;
    SpecMismatch where E does not divide F or rows do not fit.
    """
    check_feed_forward(dense)
    width = dense.up_proj.out_features
    if by not in WAYS:
        raise ConfigError(f"by is {by!r}, but must be one of {', '.join(WAYS)}")
    if num_experts < 1 or width % num_experts:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise SpecMismatch(
            f"{width} hidden units cannot be split into {num_experts} experts of equal size: choose one of {divisors}"
        )
    if k is not None and not 1 <= k <= num_experts:
        raise ConfigError(f"k is {k}, but must be between 1 and {num_experts}, the number of experts")
    if rows is None and (by == "activations" or k is not None):
        wanted = "by='activations'" if by == "activations" else "k"
        raise ConfigError(f"{wanted} needs rows of shape [rows, {dense.up_proj.in_features}]: pass them as rows")
    if rows is not None:
        _check_rows(dense, rows)
    groups = _groups(dense, num_experts, rows if by == "activations" else None, seed)
    bias = dense.down_proj.bias
    share = None if bias is None else bias.detach() / num_experts
    experts = [with_units(dense, units, share) for units in groups]
    return experts, _report(dense, experts, by, rows, k)


def _groups(dense: FeedForwardExpert, num_experts: int, rows: Tensor | None, seed: int) -> Sequence[Tensor]:
    """The hidden units of each expert, ascending."""
    width, device = dense.up_proj.out_features, dense.up_proj.weight.device
    if rows is None:
        return torch.chunk(torch.arange(width, device=device), num_experts)
    values_FR = F.normalize(hidden_values(dense, rows).T.float(), dim=1)
    labels_F = k_means(values_FR, num_experts, balanced=True, seed=seed).labels_N
    return [(labels_F == expert).nonzero()[:, 0] for expert in range(num_experts)]


def _check_rows(dense: FeedForwardExpert, rows: Tensor) -> None:
    weight = dense.up_proj.weight
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1] or rows.dtype != weight.dtype or len(rows) == 0:
        raise SpecMismatch(
            f"rows are {list(rows.shape)} {rows.dtype}, but the dense network takes [rows, {weight.shape[1]}] "
            f"{weight.dtype}, and at least one"
        )


def _report(
    dense: FeedForwardExpert, experts: Sequence[FeedForwardExpert], by: str, rows: Tensor | None, k: int | None
) -> SplitReport:
    report = SplitReport(
        by=by,
        experts=len(experts),
        hidden_units=Change(dense.up_proj.out_features, experts[0].up_proj.out_features),
        parameters=Change(parameters(dense), parameters(experts[0])),
        all_parameters=Change(parameters(dense), parameters(*experts)),
    )
    if rows is None:
        return report
    before_RO, after_REO = answers(dense, rows), answers_of(experts, rows)
    error, of_k = output_error(before_RO, after_REO.sum(dim=1)), None
    if k is not None:
        largest_RK = after_REO.double().norm(dim=2).topk(k, dim=1).indices
        kept_RKO = after_REO.gather(1, largest_RK[:, :, None].expand(-1, -1, after_REO.shape[2]))
        of_k = output_error(before_RO, kept_RKO.sum(dim=1)).relative_l2
    return replace(report, relative_l2=error.relative_l2, max_abs=error.max_abs, k=k, relative_l2_of_k=of_k)
