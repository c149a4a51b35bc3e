"""What a row declares: conditions, the arms that run under them, and how two arms become one ratio."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

RATE, P50, FASTER, ADDED = "rows/s", "p50", "times faster", "added latency"
"""Rows a second; the median latency, ours in theirs; theirs in ours; both less that of the in-process layer."""

LIMIT = "in_process"
PLACEMENTS = ("expertmesh", "expertmesh_2")
"""The product with an actor for each expert, and with its experts packed on two."""


@dataclass(frozen=True)
class Condition:
    """A layer, rows of a call, and how many calls are under way at once."""

    shape: str
    dtype: str
    rows: int
    in_flight: int

    def __str__(self) -> str:
        flight = "one at a time" if self.in_flight == 1 else f"{self.in_flight} in flight"
        return f"{self.shape} {self.dtype}, {self.rows} {'row' if self.rows == 1 else 'rows'}, {flight}"


def alone(condition: Condition) -> Condition:
    """The same with one call at a time."""
    return replace(condition, in_flight=1)


@dataclass(frozen=True)
class Target:
    """A bound of a ratio; `sense` is ">=" or "<="."""

    sense: str
    bound: float

    def met(self, ratio: float) -> bool:
        """Whether a ratio is on the right side of the bound."""
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass(frozen=True)
class Comparison:
    """Arms of ours against arms of others under one condition; the best of each side decides.

    Without a target it is printed and decides nothing. `limit` is the arm in process that is shown beside, "" for none.
    """

    condition: Condition
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    measure: str = RATE
    target: Target | None = None
    limit: str = LIMIT

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that must run at once."""
        return tuple(dict.fromkeys(name for name in (self.limit, *self.ours, *self.theirs) if name))

    def without(self, left_out: Collection[str]) -> Comparison | None:
        """The same without some arms; None where a side has no arm left."""
        ours = tuple(name for name in self.ours if name not in left_out)
        theirs = tuple(name for name in self.theirs if name not in left_out)
        return replace(self, ours=ours, theirs=theirs) if ours and theirs else None

    def tiny(self) -> Comparison:
        """The same on the smallest layer, for a test: no verdict follows."""
        small = replace(self.condition, shape="T", rows=min(self.condition.rows, 8))
        return replace(self, condition=small, target=None)


@dataclass(frozen=True)
class Row:
    """A row of the benchmark that is declared: its comparisons, all of them or the quick ones."""

    name: str
    title: str
    comparisons: Callable[[bool], list[Comparison]]
    stages: bool = False
    """Whether the way of a call through the product is taken apart under its conditions."""


def at_least(bound: float) -> Target:
    """The ratio must not be below `bound`."""
    return Target(">=", bound)


def at_most(bound: float) -> Target:
    """The ratio must not be above `bound`."""
    return Target("<=", bound)
