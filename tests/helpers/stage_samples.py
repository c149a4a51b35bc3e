"""Experts that misbehave while a new version is staged, by import string: `helpers.stage_samples:Deaf` and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

OUT_OF_MEMORY: list[Exception] = []
"""What `Hungry` raises with when it is built, once it is filled."""


class Deaf(nn.Linear):
    """A module whose own loading code leaves its bias as it is."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**state_dict, "bias": self.bias}, strict, assign)


class Folded(nn.Linear):
    """A module that keeps the bytes of its weight, in another shape than it was given."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        told = super().load_state_dict(state_dict, strict, assign)
        self.weight = nn.Parameter(self.weight.detach().view(2, 8), requires_grad=False)
        return told

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight.view(4, 4), self.bias)


class Uninitialised(nn.Linear):
    """A module that puts memory without values in the place of what it was given."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.weight = nn.Parameter(torch.empty(4, 4, device="meta"))


class Loose(nn.Linear):
    """A module whose loading raises with a secret."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        raise KeyError("a secret of the module")


class Hungry(nn.Linear):
    """A module that runs out of memory while it is built."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        if OUT_OF_MEMORY:
            raise OUT_OF_MEMORY[0]


class Fussy(nn.Linear):
    """A module that answers by what its weights are: overflow, an error, other rows."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        kind = round(float(self.bias.sum()))
        if kind == 40 and rows.any():
            raise ZeroDivisionError("a secret of the module")
        if kind == 44 and rows.any():
            raise SystemExit(3)
        if kind == 48:
            return torch.full_like(rows, torch.inf) if rows.any() else rows
        if kind == 52 and rows.any():
            return rows[:, :2]
        if kind == 56 and rows.any():
            return rows.long()
        if kind == 60 and rows.any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        if kind == 64 and rows.any():
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )
        answer: Tensor = super().forward(rows)
        return answer
