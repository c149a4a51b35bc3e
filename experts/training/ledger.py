"""What a candidate has applied: each step once, in order, with the result that it had. No torch, no clock.

A step is made of backward passes, numbered from 0, and ends with one update. A pass is told by its seed: the same
number with the same seed is a repetition, with another one it is of somebody who does not know of the first. An update
names its passes by the chain of their seeds; it happens once, and a repeated one gets the first's result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FailedPrecondition, InvalidRequest

KEPT_RESULTS = 256
"""How many results of updates are kept for those that are repeated late."""

OTHER_PASSES = -1
"""In the place of a number of passes: there are passes that the sender does not know of."""

CHAIN, MOST = 1_000_003, 1 << 62


class OutOfStep(Exception):
    """A message that does not follow what was applied: its sender has to repeat what is missing, or to catch up."""

    def __init__(self, applied: int, passes: int) -> None:
        super().__init__(f"{applied} steps are applied, and {passes} backward passes of the next one")
        self.applied = applied
        self.passes = passes


def chain(seeds: Iterable[int]) -> int:
    """A number for the seeds of passes in their order; 0 for none."""
    value = 0
    for seed in seeds:
        value = (value * CHAIN ^ (seed + 1)) % MOST
    return value


@dataclass
class Ledger:
    """The number of steps `applied`, the seeds of the backward passes of the next one, and recent results by step.

    `updates` counts the steps that changed the expert: in the others it had no rows.
    """

    applied: int = 0
    updates: int = 0
    seeds: list[int] = field(default_factory=list)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """The number of backward passes of the next step."""
        return len(self.seeds)

    def check_step(self, step: int) -> None:
        """Check that `step` is the one that comes next. Raises OutOfStep."""
        if step != self.applied + 1:
            raise OutOfStep(self.applied, self.passes)

    def check_passes(self, step: int, passes: int, seeds: int) -> None:
        """Check that the next step has so many backward passes, with this chain of seeds. Raises OutOfStep."""
        self.check_step(step)
        if passes != self.passes:
            raise OutOfStep(self.applied, self.passes if passes > self.passes else OTHER_PASSES)
        if seeds != chain(self.seeds):
            raise OutOfStep(self.applied, OTHER_PASSES)

    def is_new_pass(self, step: int, number: int, seed: int) -> bool:
        """Whether a backward pass of the next step is the next one, and not a repeated one. Raises OutOfStep."""
        self.check_step(step)
        if number > self.passes:
            raise OutOfStep(self.applied, self.passes)
        if number < self.passes and self.seeds[number] != seed:
            raise OutOfStep(self.applied, OTHER_PASSES)
        return number == self.passes

    def recorded(self, step: int, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of an update that was applied before; None for the one that comes next.

        Raises OutOfStep for one that does not follow, InvalidRequest where another update was applied under its number,
        and FailedPrecondition where its result is not kept any more.
        """
        if step > self.applied:
            self.check_step(step)
            return None
        known = self.results.get(step)
        if known is None:
            raise FailedPrecondition(f"step {step} was applied, but its result is not kept any more")
        if known["request"] != dict(request):
            raise InvalidRequest(f"another update was applied as step {step}: number each update once")
        return dict(known["result"])

    def record(self, step: int, request: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record the update that was just applied."""
        self.applied, self.updates = step, self.updates + bool(self.seeds)
        self.seeds = []
        self.results[step] = {"request": dict(request), "result": dict(result)}
        self.results.pop(step - KEPT_RESULTS, None)

    def document(self) -> dict[str, Any]:
        """The ledger in plain JSON, at the end of a step."""
        kept = [[step, entry["request"], entry["result"]] for step, entry in self.results.items()]
        return {"applied": self.applied, "updates": self.updates, "results": kept}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Ledger:
        """The ledger of a document."""
        results = {int(step): {"request": asked, "result": result} for step, asked, result in document["results"]}
        return cls(int(document["applied"]), int(document["updates"]), [], results)
