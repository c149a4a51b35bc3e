"""Least squares for the weights of experts: free, not negative, or with a sum of one.

Shapes: N values, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-10


def least_squares(
    design_NE: Tensor, target_N: Tensor, *, ridge: float = 0.0, nonnegative: bool = False, sum_to_one: bool = False
) -> Tensor:
    """The weights w [E] that minimise mean((design·w - target)²) + ridge·‖w‖², in the dtype given (use float64).

    Where several do, the free ones are those of least norm. `sum_to_one` restricts them to Σ w = 1, `nonnegative` to
    w ≥ 0 by the active set of Lawson and Hanson (1974, ch. 23), which with both starts from the best single expert.
    """
    count = design_NE.shape[1]
    if ridge:
        penalty_EE = math.sqrt(ridge * len(target_N)) * torch.eye(count).to(design_NE)
        design_NE = torch.cat([design_NE, penalty_EE])
        target_N = torch.cat([target_N, target_N.new_zeros(count)])
    return (_not_negative if nonnegative else _solved)(design_NE, target_N, sum_to_one)


def zero_sum_directions(count: int) -> Tensor:
    """An orthonormal basis [E, E - 1], float64, of the directions along which a sum of E weights stays the same."""
    columns_EE = torch.eye(count, dtype=torch.float64)
    columns_EE[:, 0] = 1
    orthonormal_EE: Tensor = torch.linalg.qr(columns_EE).Q
    return orthonormal_EE[:, 1:]


def _solved(design_NE: Tensor, target_N: Tensor, sum_to_one: bool) -> Tensor:
    if not sum_to_one:
        solution_E1: Tensor = torch.linalg.lstsq(design_NE, target_N[:, None], driver="gelsd").solution
        return solution_E1[:, 0]
    count = design_NE.shape[1]
    start_E = target_N.new_full((count,), 1 / count)
    if count == 1:
        return start_E
    directions = zero_sum_directions(count).to(design_NE)
    return start_E + directions @ _solved(design_NE @ directions, target_N - design_NE @ start_E, False)


def _not_negative(design_NE: Tensor, target_N: Tensor, sum_to_one: bool) -> Tensor:
    count = design_NE.shape[1]
    # The triangle of a QR decomposition has the same least squares in E + 1 rows.
    triangle = torch.linalg.qr(torch.cat([design_NE, target_N[:, None]], dim=1), mode="r").R
    design_NE, target_N = triangle[:, :count], triangle[:, count]
    weights_E = target_N.new_zeros(count)
    used_E = torch.zeros(count, dtype=torch.bool)
    if sum_to_one:
        used_E[(design_NE - target_N[:, None]).norm(dim=0).argmin()] = True
        weights_E[used_E] = 1
    tolerance = TOLERANCE * float(design_NE.norm() * (target_N.norm() + design_NE.norm()))
    for _ in range(10 * count):  # each turn lowers the error, but rounding might lead in a circle
        slope_E = design_NE.T @ (target_N - design_NE @ weights_E)
        if sum_to_one:
            slope_E = slope_E - slope_E[used_E].mean()
        slope_E = slope_E.masked_fill(used_E, -math.inf)
        if float(slope_E.max()) <= tolerance:
            break
        used_E[slope_E.argmax()] = True
        weights_E, used_E = _feasible(design_NE, target_N, weights_E, used_E, sum_to_one)
    return weights_E


def _feasible(
    design_NE: Tensor, target_N: Tensor, weights_E: Tensor, used_E: Tensor, sum_to_one: bool
) -> tuple[Tensor, Tensor]:
    """The best weights of the experts in use, of which those leave whose weight would turn negative."""
    while bool(used_E.any()):
        wanted_E = torch.zeros_like(weights_E)
        wanted_E[used_E] = _solved(design_NE[:, used_E], target_N, sum_to_one)
        blocked_E = used_E & (wanted_E <= 0)
        if not bool(blocked_E.any()):
            return wanted_E, used_E
        ways_E = (weights_E / (weights_E - wanted_E).clamp(min=1e-300)).masked_fill(~blocked_E, math.inf)
        weights_E = weights_E + float(ways_E.min()) * (wanted_E - weights_E)
        used_E = used_E & (ways_E > ways_E.min())
        weights_E = weights_E.where(used_E, 0.0)
    return weights_E, used_E
