"""Where the time of one call through the product's router goes, one call at a time.

Stages follow one another on the way of the last reply of a batch, so that with what is not explained they are the
whole: admit (up to the gate); gate; dispatch (group rows, build and write messages, up to the last reply's own);
channel (there and back, without the two that follow); queue and compute, which the replica says itself; combine; reply.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

from benchmarks.peers.arm import Arm
from torch import Tensor

from expertmesh.cluster.channel import router_end
from expertmesh.experts.protocol import ExpertReply
from expertmesh.router.fanout import fanout
from expertmesh.router.request import answer, batching

NAMES = ("admit", "gate", "dispatch", "channel", "queue", "compute", "combine", "reply")
PARTS = (
    (fanout, "assign"),
    (fanout, "build_call"),
    (router_end, "encode_call"),
    (router_end, "decode"),
    (router_end, "decode_reply"),
)
"""Functions that are timed beside the stages, as parts of dispatch and of the way back."""

MOST_UNEXPLAINED = 0.10
FEWEST_CALLS = 10
clock = time.monotonic
"""The clock of event loops, by which the fan-out notes when it sent a message."""


@dataclass(frozen=True)
class Stages:
    """Mean microseconds of each stage, of the functions that are parts of them, and of a whole call."""

    calls: int
    whole: float
    stages: dict[str, float]
    parts: dict[str, float]

    @property
    def unexplained(self) -> float:
        """The share of the whole that no stage covers."""
        return 1 - sum(self.stages.values()) / self.whole


@dataclass
class Trace:
    """Moments of the call that is under way, in seconds."""

    begin: float = 0.0
    gated: tuple[float, float] = (0.0, 0.0)
    sent: float = 0.0
    returned: float = 0.0
    queued: float = 0.0
    computed: float = 0.0
    combined: tuple[float, float] = (0.0, 0.0)
    parts: dict[str, float] = field(default_factory=dict)

    def stages(self, end: float) -> dict[str, float]:
        """Seconds of each stage of a call that has ended."""
        seconds = (
            self.gated[0] - self.begin,
            self.gated[1] - self.gated[0],
            self.sent - self.gated[1],
            self.returned - self.sent - self.queued - self.computed,
            self.queued,
            self.computed,
            self.combined[1] - self.combined[0],
            end - self.combined[1],
        )
        return dict(zip(NAMES, seconds, strict=True))


async def taken_apart(arm: Arm, x_TD: Tensor, seconds: float) -> Stages:
    """The stages of an arm whose router runs in this process, over calls for about so many seconds."""
    for _ in range(3):
        await arm.call(x_TD)
    seen: list[tuple[float, dict[str, float], dict[str, float]]] = []
    begin = clock()
    with _traced() as restart:
        while clock() - begin < seconds or len(seen) < FEWEST_CALLS:
            trace = restart()
            trace.begin = clock()
            await arm.call(x_TD)
            end = clock()
            seen.append((end - trace.begin, trace.stages(end), trace.parts))
    return mean(seen)


def mean(seen: list[tuple[float, dict[str, float], dict[str, float]]]) -> Stages:
    """Means over the calls but the slowest tenth: means add up as medians do not."""
    kept = sorted(seen, key=lambda one: one[0])[: max(1, len(seen) * 9 // 10)]
    stages = {name: 1e6 * statistics.fmean(stages[name] for _, stages, _ in kept) for name in NAMES}
    names = [name for _, name in PARTS]
    parts = {name: 1e6 * statistics.fmean(parts.get(name, 0.0) for _, _, parts in kept) for name in names}
    return Stages(len(kept), 1e6 * statistics.fmean(whole for whole, _, _ in kept), stages, parts)


@contextmanager
def _traced() -> Iterator[Callable[[], Trace]]:
    """The product's functions with clocks around them; what is given starts the trace of a call."""
    current = [Trace()]

    def restart() -> Trace:
        current[0] = Trace()
        return current[0]

    def span(name: str) -> Callable[..., None]:
        return lambda begin, end, *_: setattr(current[0], name, (begin, end))

    def returned(begin: float, end: float, _: Any, lane: Any, message: Any, reply: Any) -> None:
        trace = current[0]
        if isinstance(reply, ExpertReply) and begin >= trace.returned:
            trace.sent, trace.returned = message.started, begin
            trace.queued, trace.computed = reply.queued, reply.computed

    def part(name: str) -> Callable[..., None]:
        def seen(begin: float, end: float, *_: Any) -> None:
            parts = current[0].parts
            parts[name] = parts.get(name, 0.0) + end - begin

        return seen

    with ExitStack() as stack:
        _wrap(stack, batching, "route_together", span("gated"))
        _wrap(stack, answer.Answer, "_combine", span("combined"))
        _wrap(stack, fanout.Fanout, "_returned", returned)
        for module, name in PARTS:
            _wrap(stack, module, name, part(name))
        yield restart


def _wrap(stack: ExitStack, owner: Any, name: str, told: Callable[..., None]) -> None:
    """Tell when a function began and ended, and what it was given; undone with the stack."""
    function = getattr(owner, name)

    @wraps(function)
    def timed(*given: Any, **named: Any) -> Any:
        begin = clock()
        try:
            return function(*given, **named)
        finally:
            told(begin, clock(), *given)

    stack.enter_context(patch.object(owner, name, timed))
