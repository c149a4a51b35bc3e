"""Fair comparison on a noisy machine: blocks that take turns, medians, and a bootstrap interval of a ratio."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Median of the ratio over blocks, and the bounds of its bootstrap interval: 2.5 and 97.5 % of what is drawn."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def turn(names: Sequence[str], block: int) -> list[str]:
    """The order of the names in one round: where it begins rotates, so that none is always first."""
    start = block % max(1, len(names))
    return [*names[start:], *names[:start]]


def ratio(
    ours: Sequence[float], theirs: Sequence[float], *, rounds: Sequence[int] | None = None, draws: int = 2000
) -> Ratio:
    """The ratio of two functions that were timed in the same blocks; `rounds` says to which round each block belongs.

    Blocks of a round have their minutes in common, so the bootstrap draws rounds first and then blocks of each
    (cluster bootstrap; Davison and Hinkley 1997, section 3.8): rounds that disagree make the interval wider. Of two
    rounds that disagree it spans about both, and holds the true value less often than 95 times in 100.
    """
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    together: dict[int, list[float]] = {}
    for round_, one in zip(rounds or [0] * len(ratios), ratios, strict=True):
        together.setdefault(round_, []).append(one)
    groups, generator = list(together.values()), random.Random(0)
    medians = sorted(statistics.median(_drawn(groups, generator)) for _ in range(draws))
    return Ratio(statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)])


def _drawn(groups: Sequence[Sequence[float]], generator: random.Random) -> list[float]:
    chosen = generator.choices(groups, k=len(groups)) if len(groups) > 1 else groups
    return [one for group in chosen for one in generator.choices(group, k=len(group))]
