"""Experts that the tests name by import string, as a configuration would: `helpers.samples:Affine` and so on."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

SOMETHING = 3
RESTLESS: list[str] = []
"""What `restless` raises with, once it has been called with rows that are not zero."""


class Affine(nn.Module):
    """rows * scale + shift, with a learned row on top."""

    def __init__(self, width: int = 4, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale, self.shift = scale, shift

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.scale + self.shift + self.bias


class Sizes(nn.Module):
    """A module whose constructor reads numbers out of tensors, as schedules of dropout do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [value.item() for value in torch.linspace(0, 1, 3)]
        self.linear = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows) * self.rates[-1]


class LooksAtData(nn.Module):
    """A module whose code depends on the rows' values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows) if rows.sum().item() >= 0 else rows


class LooksAtPlaces(nn.Module):
    """A module whose code depends on where the rows are above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        answer = self.linear(rows)
        answer[rows.nonzero(as_tuple=True)] += 1
        return answer


class Half(nn.Linear):
    """A module of float16 parameters."""

    def __init__(self, width: int = 4, dtype: str = "float16") -> None:
        super().__init__(width, width, dtype=getattr(torch, dtype))


def relu(rows: Tensor) -> Tensor:
    """A function over rows."""
    return rows.relu()


def scaled(rows: Tensor, by: float = 2.0) -> Tensor:
    """A function over rows that has an optional argument too."""
    return rows * by


def make_linear() -> nn.Module:
    """A factory without arguments."""
    return nn.Linear(4, 4)


def make_scale(by: float = 3.0) -> object:
    """A factory all of whose arguments are optional: it is called, too."""
    return lambda rows: rows * by


def make_number() -> int:
    return 5


def make_trouble() -> NoReturn:
    raise OSError("no such device")


def make_panic() -> NoReturn:
    raise Panic("a library of Rust panicked")


def raises(rows: Tensor) -> NoReturn:
    raise ZeroDivisionError("a secret of the expert")


def leaves(rows: Tensor) -> NoReturn:
    raise SystemExit(3)


class Panic(BaseException):
    """Stands for what is no Exception: a panic of a Rust library, gevent's Timeout, asyncio.CancelledError."""


def panics(rows: Tensor) -> NoReturn:
    raise Panic("a secret of the expert")


def interrupts(rows: Tensor) -> NoReturn:
    raise KeyboardInterrupt


def sparse(rows: Tensor) -> Tensor:
    return rows.to_sparse()


def deep(rows: Tensor) -> Tensor:
    """A function that answers with more dimensions than can be sent."""
    return rows.reshape(len(rows), *[1] * 8, -1)


def not_a_number(rows: Tensor) -> Tensor:
    return torch.full_like(rows, torch.nan)


def narrow(rows: Tensor) -> Tensor:
    """A function that answers with fewer rows than it got."""
    return rows[1:]


def text(rows: Tensor) -> str:
    return "rows"


def complex_rows(rows: Tensor) -> Tensor:
    return rows.to(torch.complex64)


def halves(rows: np.ndarray) -> np.ndarray:
    """A numpy function of this module, which only `framework` can tell."""
    assert isinstance(rows, np.ndarray)
    return rows / 2


def labels(rows: Tensor) -> Tensor:
    """A classifier: the label of each row, int64 [n]."""
    return (rows.sum(dim=tuple(range(1, rows.ndim))) > 0).long()


class FailsToStart(nn.Module):
    """Looks right in every check, which allocates nothing, and fails where it is really built."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(3))
        if self.bias.device.type != "meta":
            raise OSError("the disk is gone")

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.bias
