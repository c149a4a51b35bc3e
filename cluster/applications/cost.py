"""What a model costs: its parameters, and the floating-point operations of a row, as torch counts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(*modules: nn.Module) -> int:
    """The number of parameters of modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@torch.no_grad()
def flops_of(call: Callable[[], Any], rows: int) -> float:
    """The floating-point operations of a call per row: of matrix products and the like, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / rows


def rate_of(call: Callable[[], int], seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter) -> float:
    """How many rows per second calls answer, which return their number, over at least so many seconds."""
    call()
    rows, began = 0, clock()
    while rows == 0 or clock() - began < seconds:
        rows += call()
    return rows / max(clock() - began, 1e-9)
