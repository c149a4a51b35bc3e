"""The phases of a training, and what of them is pure: batches, learning rates, when to stop.

Shapes: T rows, E experts, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from ..client.training.schedule import schedule_of

KINDS = ("experts", "gate", "joint")
SUBSETS = ("random", "label", "cluster", "all")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: "experts" (each on its subset of the rows), "gate" (with the experts as they are), or "joint".

    `lr` follows the `schedule` "constant", "linear", "cosine" or "one_cycle", after `warmup` (a share of the steps).
    Training stops early after `patience` epochs in which the held-out figure has not improved; None never does.

    Raises ConfigError.
    """

    kind: str
    epochs: int = 10
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"a phase is one of {', '.join(KINDS)}, not {self.kind!r}")
        if type(self.epochs) is not int or self.epochs < 1:
            raise ConfigError(f"epochs must be a whole number of 1 or more, not {self.epochs!r}")
        if not 0 <= self.lr < math.inf or not 0 <= self.warmup < 1:
            raise ConfigError(f"lr must be 0 or more and warmup a share below 1, not {self.lr} and {self.warmup}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be 1 or more epochs, not {self.patience}")
        schedule_of(self.schedule, 10, 0)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0, of `total`."""
        warmup = 0 if self.schedule == "one_cycle" else min(total - 1, round(self.warmup * total))
        return self.lr * schedule_of(self.schedule, total, warmup)(step)


@dataclass(frozen=True)
class Pairs:
    """The rows [N] of one step, and for experts on subsets the expert of each, ascending; else None."""

    rows_N: Tensor
    experts_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows_N)


def epoch_batches(kind: str, seen_TE: Tensor, batch: int, draw: tuple[int, ...]) -> list[Pairs]:
    """The steps of an epoch: the same for the same numbers `draw`.

    Of `batch` rows each; or where experts are trained on their own rows, of `batch` rows of each expert, so that one
    with more rows than others makes more steps.
    """
    generator = torch.Generator().manual_seed(hash(draw) % 2**62)
    if kind != "experts":
        return [Pairs(rows_N) for rows_N in torch.split(torch.randperm(len(seen_TE), generator=generator), batch)]
    own = []
    for expert in range(seen_TE.shape[1]):
        rows_N = seen_TE[:, expert].nonzero()[:, 0]
        own.append(torch.split(rows_N[torch.randperm(len(rows_N), generator=generator)], batch))
    batches = []
    for step in range(max(len(parts) for parts in own)):
        present = [(expert, parts[step]) for expert, parts in enumerate(own) if step < len(parts)]
        experts_N = torch.cat([torch.full_like(rows_N, expert) for expert, rows_N in present])
        batches.append(Pairs(torch.cat([rows_N for _, rows_N in present]), experts_N))
    return batches


def steps_of(kind: str, seen_TE: Tensor, batch: int) -> int:
    """The number of steps of an epoch."""
    count = int(seen_TE.sum(dim=0).max()) if kind == "experts" else len(seen_TE)
    return -(-count // batch)


def should_stop(figures: Sequence[float], patience: int | None, *, higher_is_better: bool) -> bool:
    """Whether the best of the held-out figures is `patience` epochs old."""
    if patience is None or len(figures) <= patience:
        return False
    signed = [figure if higher_is_better else -figure for figure in figures]
    return max(signed[-patience:]) <= max(signed[:-patience])
