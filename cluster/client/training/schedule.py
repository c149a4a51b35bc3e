"""The learning rate of each step, as a factor of the base rate: torch's schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from ....experts.errors import ConfigError

Schedule = Callable[[int], float]
"""The factor for a step, counted from 0, as torch.optim.lr_scheduler.LambdaLR has it."""

NAMES = ("constant", "linear", "cosine", "one_cycle")
RISE, FROM, TO = 0.3, 1 / 25, 1 / 25e4
"""The share of the steps in which one_cycle rises, and the factors that it begins and ends with, as in torch."""


def schedule_of(name: str | Schedule | None, total_steps: int | None, warmup_steps: int) -> Schedule:
    """The schedule of a name, or the function that is given.

    After `warmup_steps` of linear growth, "constant" stays, "linear" falls to 0 at `total_steps`, and so does "cosine"
    (Loshchilov and Hutter 2017, eq. 5, without restarts). "one_cycle" rises to 1 and falls to almost 0 along cosines
    (Smith and Topin 2018, as torch.optim.lr_scheduler.OneCycleLR has it); it takes no warmup. Raises ConfigError.
    """
    if callable(name):
        return name
    name = name or "constant"
    if name not in NAMES:
        raise ConfigError(f"schedule {name!r} is not one of {', '.join(NAMES)}, nor a function of the step")
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps must be 0 or more, not {warmup_steps}")
    if name == "constant":
        return lambda step: _warm(step, warmup_steps)
    if total_steps is None or total_steps <= warmup_steps:
        raise ConfigError(f"schedule {name!r} needs total_steps, more than warmup_steps={warmup_steps}")
    if name == "one_cycle":
        return lambda step: _one_cycle(step, total_steps)
    span = total_steps - warmup_steps

    def falling(step: int) -> float:
        done = min(1.0, max(0.0, (step - warmup_steps) / span))
        left = 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return _warm(step, warmup_steps) * left

    return falling


def _warm(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _one_cycle(step: int, total: int) -> float:
    top, last = RISE * total - 1, total - 1
    if step <= top:
        return _between(FROM, 1.0, step / max(top, 1e-9))
    return _between(1.0, TO, min(1.0, (step - top) / max(last - top, 1e-9)))


def _between(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2.0 * (1.0 + math.cos(math.pi * share))
