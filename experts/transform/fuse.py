"""Fuse experts of equal shapes into one: by average, by load, or along the arc between two."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SpecMismatch
from ..weights.files import check_fit, tensors_of
from .feed_forward import check_alike
from .measure import answers, answers_of, output_error, parameters
from .report import Change, Report

METHODS = ("average", "load", "slerp")
PARALLEL = 0.9995
"""Above this |cosine| two tensors have no arc worth following, and are averaged along the straight line."""


@dataclass(frozen=True, kw_only=True)
class FuseReport(Report):
    """Several experts and the one they became, before and after.

    `parameters` are those of all experts and of the fused one. `weights` is the part of each expert in it.
    `relative_l2` and `max_abs` (see `OutputError`) compare its answers with the mean of the experts' answers under
    these weights, on the rows; None without rows.
    """

    method: str
    weights: tuple[float, ...]
    parameters: Change
    relative_l2: float | None = None
    max_abs: float | None = None


def fuse(
    experts: Sequence[nn.Module],
    method: str = "average",
    *,
    load: Sequence[float] | Tensor | None = None,
    t: float | None = None,
    rows: Tensor | None = None,
) -> tuple[nn.Module, FuseReport]:
    """One expert with tensors made of those of several, by name; the experts stay as they are.

    "average": the mean. "load": the mean weighted by `load`, such as rows per expert (the frequency-weighted merge of
    MC-SMoE, Li et al. 2024). "slerp": from the first of two experts (`t` = 0) to the second (1), by default half-way,
    along the arc between each pair of tensors: sin((1 - t)·θ)/sin θ · a + sin(t·θ)/sin θ · b (Shoemake 1985), or on a
    straight line where they are nearly parallel or opposite. Computed in float64. Hidden units are taken in their
    order: experts whose units stand in another order lose by it, which the error on `rows` [R, ...] shows.

    Raises ConfigError for an unknown method, options that it does not take, and loads or `t` out of range; SpecMismatch
    for experts of different classes, activation functions, names, shapes or dtypes, or whose integer tensors differ.
    """
    weights = _weights(len(experts), method, load, t)
    check_alike(experts)
    states = [tensors_of(expert) for expert in experts]
    kinds = [{name: (tuple(x.shape), x.dtype) for name, x in state.items()} for state in states]
    for index, kind in enumerate(kinds):
        check_fit(kind, kinds[0], f"expert {index}", "first expert")
    fused = copy.deepcopy(experts[0])
    with torch.no_grad():
        for name, into in tensors_of(fused).items():
            into.copy_(_fused(name, [state[name] for state in states], weights, arc=method == "slerp"))
    report = FuseReport(
        method=method, weights=tuple(weights), parameters=Change(parameters(*experts), parameters(fused))
    )
    if rows is None:
        return fused, report
    weights_E = torch.tensor(weights, dtype=torch.float64)
    mean = torch.einsum("e,te...->t...", weights_E, answers_of(experts, rows).double().cpu())
    error = output_error(mean, answers(fused, rows).cpu())
    return fused, replace(report, relative_l2=error.relative_l2, max_abs=error.max_abs)


def _weights(count: int, method: str, load: Sequence[float] | Tensor | None, t: float | None) -> list[float]:
    """The part of each expert, which sum to one."""
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, but must be one of {', '.join(METHODS)}")
    if count < 2 or (method == "slerp" and count != 2):
        wanted = "exactly two" if method == "slerp" else "at least two"
        raise ConfigError(f"method {method!r} needs {wanted} experts, not {count}")
    for option, value, owner in (("load", load, "load"), ("t", t, "slerp")):
        if value is not None and method != owner:
            raise ConfigError(f"method {method!r} takes no {option}: leave it out, or use method {owner!r}")
    if method == "slerp":
        t = 0.5 if t is None else t
        if not 0 <= t <= 1:
            raise ConfigError(f"t is {t}, but must lie between 0 (the first expert) and 1 (the second)")
        return [1 - t, t]
    if method == "average":
        return [1 / count] * count
    if load is None:
        raise ConfigError("method 'load' needs load, an amount for each expert, as its number of rows")
    loads = [float(amount) for amount in load]
    total = sum(loads)
    if len(loads) != count or not all(0 <= amount < math.inf for amount in loads) or total == 0:
        raise ConfigError(f"load is {loads}, but must hold {count} finite amounts of 0 or more, and one above 0")
    return [amount / total for amount in loads]


def _fused(name: str, tensors: Sequence[Tensor], weights: Sequence[float], *, arc: bool) -> Tensor:
    if not tensors[0].is_floating_point():
        if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise SpecMismatch(f"{name!r} is {tensors[0].dtype} and differs among the experts: it has no average")
        return tensors[0]
    wide = [tensor.double() for tensor in tensors]
    return torch.stack(
        [weight * x for weight, x in zip(_arc(wide, weights) if arc else weights, wide, strict=True)]
    ).sum(0)


def _arc(pair: Sequence[Tensor], weights: Sequence[float]) -> Sequence[float]:
    """The factors of two tensors on the arc between them."""
    lengths = float(pair[0].norm() * pair[1].norm())
    cosine = float((pair[0] * pair[1]).sum()) / lengths if lengths else 1.0
    if not abs(cosine) <= PARALLEL:
        return weights
    angle = math.acos(cosine)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]
