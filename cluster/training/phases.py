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
    """What one epoch trains on: rows [N], and for experts on subsets the expert of each, else None."""

    rows_N: Tensor
    experts_N: Tensor | None

    def __len__(self) -> int:
        return len(self.rows_N)

    def part(self, start: int, stop: int) -> Pairs:
        """The pairs start:stop."""
        experts_N = None if self.experts_N is None else self.experts_N[start:stop]
        return Pairs(self.rows_N[start:stop], experts_N)


def epoch_pairs(kind: str, seen_TE: Tensor, seed: int, phase: int, epoch: int) -> Pairs:
    """The pairs of an epoch in the order in which they are trained on: the same for the same numbers."""
    generator = torch.Generator().manual_seed(hash((seed, phase, epoch)) % 2**62)
    if kind == "experts":
        rows_N, experts_N = seen_TE.nonzero(as_tuple=True)
        order = torch.randperm(len(rows_N), generator=generator)
        return Pairs(rows_N[order], experts_N[order])
    return Pairs(torch.randperm(len(seen_TE), generator=generator), None)


def batch_size(kind: str, batch: int, num_experts: int) -> int:
    """How many pairs a step has: `batch` for each expert where all are trained on their own rows."""
    return batch * num_experts if kind == "experts" else batch


def steps_of(kind: str, seen_TE: Tensor, batch: int) -> int:
    """The number of steps of an epoch."""
    count = int(seen_TE.sum()) if kind == "experts" else len(seen_TE)
    return -(-count // batch_size(kind, batch, seen_TE.shape[1]))


def should_stop(figures: Sequence[float], patience: int | None, *, higher_is_better: bool) -> bool:
    """Whether the best of the held-out figures is `patience` epochs old."""
    if patience is None or len(figures) <= patience:
        return False
    signed = [figure if higher_is_better else -figure for figure in figures]
    return max(signed[-patience:]) <= max(signed[:-patience])
