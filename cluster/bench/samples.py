"""What a load notes while it runs: one sample for each request, and the counters of the cluster before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OK = "OK"
NOT_SENT = "NOT_SENT"
"""The code of a request that was due while the most that may be in flight were in flight."""
INTERRUPTED = "INTERRUPTED"
"""The code of a request that was given up because the load was ended."""


class Sample(NamedTuple):
    """One request: when it was due, was sent and was done, in seconds since measuring began, and what came of it."""

    layer: str
    rows: int
    due: float
    sent: float
    done: float
    code: str = OK
    retries: int = 0
    epoch: int = 0

    @property
    def latency_ms(self) -> float:
        """From when it was due, so that waiting for its turn to be sent counts."""
        return (self.done - self.due) * 1000.0


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The rows that each expert has answered, by its id, and when that was so, in seconds since measuring began."""

    at: float
    router: str
    rows: Mapping[str, int]


@dataclass(kw_only=True)
class Measured:
    """What a load gave. `seconds` is how long it was measured; `errors` has the first message of each code.

    `samples` has the warm-up too, with times below 0; `versions` counts answers without it.
    """

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    versions: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    before: Counters | None = None
    after: Counters | None = None
    interrupted: bool = False


def counters_of(status: Mapping[str, Any], at: float) -> Counters:
    """The experts' counters in a status document."""
    layers = (status.get("layers") or {}).values()
    rows = {id: int(expert.get("rows") or 0) for layer in layers for id, expert in layer.get("experts", {}).items()}
    return Counters(at=at, router=str((status.get("router") or {}).get("incarnation")), rows=rows)
