"""The measurements of a load: one sample per request, and the counters of the cluster before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OK = "OK"
NOT_SENT = "NOT_SENT"
"""The code of a request that was dropped because the limit of requests in flight was reached."""
INTERRUPTED = "INTERRUPTED"
"""The code of a request that was abandoned because the load was interrupted."""


class Sample(NamedTuple):
    """One request: when it was due, sent and done, in seconds since the measurement started, and its outcome."""

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
        """Latency from the time the request was due, so it includes any delay before sending."""
        return (self.done - self.due) * 1000.0


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The rows answered by each expert id, read `at` seconds after the measurement started."""

    at: float
    router: str
    rows: Mapping[str, int]


@dataclass(kw_only=True)
class Measured:
    """The measurements of one load over `seconds`; `errors` has the first message of each code.

    `samples` includes the warm-up, with due times below 0; `versions` counts answers without the warm-up.
    """

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    versions: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    before: Counters | None = None
    after: Counters | None = None
    interrupted: bool = False


def counters_of(status: Mapping[str, Any], at: float) -> Counters:
    """Read the experts' counters from a status document."""
    layers = (status.get("layers") or {}).values()
    rows = {id: int(expert.get("rows") or 0) for layer in layers for id, expert in layer.get("experts", {}).items()}
    return Counters(at=at, router=str((status.get("router") or {}).get("incarnation")), rows=rows)
