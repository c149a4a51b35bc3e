"""Plain functions over rows that tests make experts of: exact, failing, or failing for some rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows * factor


def nan_below_zero(factor: float) -> Callable[[Tensor], Tensor]:
    """`times`, but NaN for rows whose first feature is below zero."""
    return lambda rows: torch.where(rows[:, :1] < 0, torch.nan, rows * factor)


def raising(rows: Tensor) -> Tensor:
    raise ZeroDivisionError
