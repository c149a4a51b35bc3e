"""Processes that can die, and calls between them that may be late, doubled, reordered or lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sim.clock import Clock

from expertmesh.cluster.control.messages import Candidate, Desired, RouterUpdate, SwapRequest
from expertmesh.cluster.control.ports import ControllerState
from expertmesh.router.fanout.replica_view import Replica

Reply = Callable[[Any], None]


@dataclass(frozen=True)
class Weather:
    """How badly messages fare: shares of messages, and seconds."""

    lost: float = 0.0
    doubled: float = 0.15
    slow: float = 0.1
    delay: float = 0.08
    slow_delay: float = 0.9
    silent_death: float = 0.0


class Process:
    """Something that receives calls until it dies. A restart makes another object with another incarnation.

    A process that is asked for things that must not happen twice is not `doubled`: its callers repeat no message.
    """

    doubled = True

    def __init__(self, name: str, incarnation: str) -> None:
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.cut_off = False
        self.frozen: list[Callable[[], object]] | None = None
        self.calls: dict[int, Call] = {}

    def run(self, step: Callable[[], object]) -> None:
        """Take a step, or leave it for later where this process is frozen."""
        if self.frozen is not None:
            self.frozen.append(step)
        elif self.alive:
            step()

    def wake(self) -> None:
        """Go on with all that has come in meanwhile."""
        steps, self.frozen = self.frozen or [], None
        for step in steps:
            self.run(step)

    def receive(self, method: str, arguments: tuple[Any, ...], reply: Reply) -> None:
        """Handle one call: `on_<method>` answers through `reply`, now or later."""
        getattr(self, f"on_{method}")(reply, *arguments)


class Call:
    """One call that waits for its reply; `done` gets the reply, or None when there is none."""

    def __init__(self, number: int, sender: Process, target: Process | None, done: Reply) -> None:
        self.number = number
        self.sender = sender
        self.target = target
        self._done = done
        self.open = True

    def end(self, result: Any) -> None:
        """Give the sender the result, once, and only while it lives."""
        if self.open:
            self.open = False
            if self.target is not None:
                self.target.calls.pop(self.number, None)
            if self.sender.alive:
                self.sender.run(lambda: self._done(result))


class Network:
    """Carries calls. A call is bound to the process that has the name when it is sent, like a connection."""

    def __init__(self, clock: Clock, weather: Weather) -> None:
        self.clock = clock
        self.weather = weather
        self.processes: dict[str, Process] = {}
        self.tell: Callable[[str], None] | None = None
        self._number = 0

    def call(
        self, sender: Process, target: str, method: str, arguments: tuple[Any, ...], done: Reply, timeout: float
    ) -> None:
        """Call a method of another process; `done(None)` means that no answer came in time."""
        self._number += 1
        found = self.processes.get(target)
        call = Call(self._number, sender, found, done)
        if found is None or not found.alive:
            self.clock.after(self._delay(), call.end, None)
            return
        found.calls[call.number] = call
        self.clock.after(timeout, call.end, None)
        if not self.clock.chance(self.weather.lost):
            self.clock.after(self._delay(), self._deliver, call, found, method, arguments)
        if found.doubled and self.clock.chance(self.weather.doubled):  # a copy that comes late
            late = self.clock.between(self.weather.delay, self.weather.slow_delay)
            self.clock.after(late, self._deliver, call, found, method, arguments)

    def died(self, process: Process) -> None:
        """Tell those who wait for a dead process: mostly at once, as when a socket closes."""
        for call in list(process.calls.values()):
            if not self.clock.chance(self.weather.silent_death):
                self.clock.after(self._delay(), call.end, None)

    def _deliver(self, call: Call, target: Process, method: str, arguments: tuple[Any, ...]) -> None:
        if self.tell is not None:
            told = ", ".join(map(brief, arguments))
            self.tell(f"{call.sender.incarnation} -> {target.incarnation} #{call.number}: {method} {told}")
        if not target.alive:
            self.clock.after(self._delay(), call.end, None)
        elif not self._cut(call, target):
            target.run(lambda: target.receive(method, arguments, lambda result: self._answer(call, target, result)))

    def _answer(self, call: Call, target: Process, result: Any) -> None:
        if self.tell is not None:
            self.tell(f"{target.incarnation} answers #{call.number}: {brief(result)}")
        if target.alive and not self._cut(call, target) and not self.clock.chance(self.weather.lost):
            self.clock.after(self._delay(), call.end, result)

    def _cut(self, call: Call, target: Process) -> bool:
        """A process that is cut off cannot speak with the controller."""
        ends = (call.sender, target)
        return any(end.cut_off for end in ends) and any(end.name == "controller" for end in ends)

    def _delay(self) -> float:
        weather = self.weather
        if self.clock.chance(weather.slow):
            return self.clock.between(weather.delay, weather.slow_delay)
        return self.clock.between(0.001, weather.delay)


def brief(value: Any) -> str:
    """What of a message is worth printing; nothing that is another text in another process."""
    if isinstance(value, Candidate):
        return f"{value.id} v{value.counter} {value.version} {value.replaces} {value.tensor_digest} {value.note}"
    if isinstance(value, Desired):
        return f"revision {value.revision}"
    if isinstance(value, RouterUpdate):
        return f"epoch {value.current} of {value.epochs} on {', '.join(map(brief, value.replicas))}"
    if isinstance(value, ControllerState):
        return f"revision {value.revision}, epoch {value.epoch}"
    if isinstance(value, Replica):
        return f"{value.incarnation} {value.state} {sorted(value.holds)}"
    if isinstance(value, SwapRequest):
        return f"{value.swap_id}: {value.changes} for {value.expect}"
    return repr(value)
