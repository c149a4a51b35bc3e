"""What reports measure: the answers of an expert, how far two answers differ, how long a call takes, its parameters.

Shapes: T rows, E experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SpecMismatch
from ..modules import PackedExperts

RowsFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OutputError:
    """How far answers lie from those they replace.

    `relative_l2`: ‖after - before‖ / ‖before‖ over all rows, None where the answers before are all zero and those after
    are not. `max_abs`: the largest absolute difference of two values.
    """

    relative_l2: float | None
    max_abs: float


def output_error(before: Tensor, after: Tensor) -> OutputError:
    """Compare answers of equal shape [T, ...], in float64. Raises SpecMismatch for other shapes."""
    if before.shape != after.shape:
        raise SpecMismatch(
            f"answers of shape {list(after.shape)} cannot be compared with answers of shape {list(before.shape)}"
        )
    difference = (after.double() - before.double()).flatten()
    distance, length = float(difference.norm()), float(before.double().norm())
    relative = distance / length if length else (0.0 if distance == 0 else None)
    return OutputError(relative, float(difference.abs().max()) if difference.numel() else 0.0)


def answers(expert: RowsFunction, rows: Tensor) -> Tensor:
    """The answers of an expert to rows [T, ...], without gradient, a module in evaluation mode.

    Those of `PackedExperts` are [T, E, D]: of each of them to each row. Raises SpecMismatch unless there is one answer
    for each row.
    """
    with torch.no_grad(), _evaluating(expert):
        if isinstance(expert, PackedExperts):
            count, copies = rows.shape[0], expert.num_experts
            offsets = [count * index for index in range(copies + 1)]
            return expert(rows.repeat(copies, 1), offsets).unflatten(0, (copies, count)).transpose(0, 1)  # type: ignore[no-any-return]
        answered = expert(rows)
    if not isinstance(answered, Tensor) or answered.shape[:1] != rows.shape[:1]:
        kind = list(answered.shape) if isinstance(answered, Tensor) else type(answered).__name__
        raise SpecMismatch(f"an expert returned {kind} for {rows.shape[0]} rows, but must return one answer for each")
    return answered


def answers_of(experts: PackedExperts | Sequence[RowsFunction], rows: Tensor) -> Tensor:
    """The answers [T, E, ...] of each expert to each row [T, ...], without gradient.

    Raises ConfigError for no experts, and SpecMismatch for answers of different shapes or dtypes.
    """
    if isinstance(experts, PackedExperts):
        return answers(experts, rows)
    if not experts:
        raise ConfigError("there are no experts: give at least one")
    parts = [answers(expert, rows) for expert in experts]
    kinds = {(tuple(part.shape), part.dtype) for part in parts}
    if len(kinds) > 1:
        shown = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise SpecMismatch(f"the experts' answers differ in shape or dtype: {shown}")
    return torch.stack(parts, dim=1)


def median_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median duration of each call, in seconds; the calls take turns, so that a busy machine slows all alike.

    Raises ConfigError for fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, but must be at least 1")
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):  # the first turn only warms up
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def parameters(*modules: nn.Module) -> int:
    """The number of parameters of modules, each counted once."""
    return sum({id(parameter): parameter.numel() for m in modules for parameter in m.parameters()}.values())


@contextmanager
def _evaluating(expert: object) -> Iterator[None]:
    """A module in evaluation mode, and each part in its own mode again afterwards."""
    before = [(part, part.training) for part in expert.modules()] if isinstance(expert, nn.Module) else []
    try:
        for part, _ in before:
            part.training = False
        yield
    finally:
        for part, mode in before:
            part.training = mode
