"""What a run is told by: quantiles, rows a second, gaps, and the lines that are printed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .checker import MIXED, RIGHT, Checker
from .load import Load, SeenEpoch


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values do not exceed; NaN of none."""
    found = sorted(values)
    return found[max(0, math.ceil(share * len(found)) - 1)] if found else math.nan


def between(seen: Iterable[SeenEpoch], begin: float, end: float) -> list[SeenEpoch]:
    """The requests that were due in a span of time."""
    return [one for one in seen if begin <= one.due < end]


def p99_ms(seen: Iterable[SeenEpoch]) -> float:
    """The 99th percentile of the latency in milliseconds; a request that failed counts as never answered."""
    return 1000 * quantile((math.inf if one.error else one.latency for one in seen), 0.99)


def overlapped(seen: Iterable[SeenEpoch], flips: Sequence[float]) -> int:
    """How many answered requests had been sent before a flip, and were answered after it."""
    return sum(any(one.sent < flip < one.done for flip in flips) for one in seen if not one.error)


def rows_per_second(seen: Iterable[SeenEpoch], begin: float, end: float, count: int) -> float:
    """Rows that were answered in a span of time, a second."""
    return sum(count for one in seen if not one.error and begin <= one.done < end) / (end - begin)


def longest_gap(seen: Iterable[SeenEpoch], begin: float, end: float) -> float:
    """The longest time without an answer in a span, in seconds."""
    times = [begin, *sorted(one.done for one in seen if not one.error and begin <= one.done <= end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def went_back(seen: Sequence[SeenEpoch]) -> int:
    """How many requests of one client were answered from an older epoch than one answered before they were sent."""
    return behind(seen, [(one.done, one.reply.epoch) for one in seen if not one.error])


def behind(seen: Iterable[SeenEpoch], known: Iterable[tuple[float, int]]) -> int:
    """How many requests were answered from an older epoch than one that was known, as (time, epoch), when they were
    sent."""
    events, place, newest, found = sorted(known), 0, 0, 0
    for one in sorted((one for one in seen if not one.error), key=lambda one: one.sent):
        while place < len(events) and events[place][0] < one.sent:
            newest = max(newest, events[place][1])
            place += 1
        found += one.reply.epoch < newest
    return found


def judged(checker: Checker, load: Load) -> Mapping[str, int]:
    """Every request of a load judged: right, wrong (also unknown), mixed, failed."""
    seen = load.seen
    verdicts = Counter("failed" if one.error else checker.judge(load.input(one), one.reply) for one in seen)
    wrong = sum(verdicts.values()) - verdicts[RIGHT] - verdicts[MIXED] - verdicts["failed"]
    return {
        "requests": len(seen),
        "right": verdicts[RIGHT],
        "failed": verdicts["failed"],
        "wrong": wrong,
        "mixed": verdicts[MIXED],
        "went back": went_back(seen),
    }


def harm(found: Mapping[str, int]) -> int:
    """How many requests did not get what was promised."""
    return found["failed"] + found["wrong"] + found["mixed"] + found["went back"]


def say(name: str, value: object, wanted: str = "") -> None:
    """One line of a result."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    print(f"{name:<44} {text:>12}  {wanted}".rstrip(), flush=True)


def say_judged(checker: Checker, load: Load) -> Mapping[str, int]:
    """Judge every request of a load and say what was found, with an example of each kind of failure."""
    found = judged(checker, load)
    say("requests, each answer recomputed", found["requests"])
    for name in ("failed", "wrong", "mixed", "went back"):
        say(name, found[name], "0 wanted")
    for example in checker.examples:
        print(f"    {example}")
    for error, times in Counter(one.error for one in load.seen if one.error).most_common(3):
        print(f"    failed {times} times: {error}")
    return found
