"""Runs parties: starts arms once for as long as they are needed, compares their answers, then times them in turns."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from benchmarks.compare import turn
from benchmarks.peers import catalogue
from benchmarks.peers.arm import Arm, ArmUnavailable
from benchmarks.peers.measure import Block, block
from benchmarks.peers.model import DTYPES, SHAPES, TOLERANCE, difference, expert, reference, rows
from benchmarks.peers.private_ray import private_ray
from torch import Tensor

from .case import Condition, alone
from .plan import Party, spare
from .stages import Stages, taken_apart

ON_RAY = (
    "ray_naive", "ray_good", "ray_good_2", "ray_good_1",
    "expertmesh", "expertmesh_1", "expertmesh_2", "expertmesh_4", "expertmesh_2_stalled",
)  # fmt: skip
"""Arms on the Ray of this process: Ray's own, and those that attach to a cluster."""

STAGED = "expertmesh"
WARM_SECONDS = 0.2


@dataclass(frozen=True)
class Effort:
    """How many blocks, of how many seconds, and in how many rounds; all rounds within `limit` seconds, if they can.

    What the neighbours of a virtual machine do changes with the minutes: blocks that follow each other agree with one
    another, and an interval of theirs is too narrow. Those of two rounds lie minutes apart.
    """

    blocks: int
    seconds: float
    rounds: int = 1
    limit: float = math.inf

    def part(self, round_: int) -> int:
        """How many of the blocks belong to a round."""
        return (self.blocks + self.rounds - 1 - round_) // self.rounds

    def hurried(self, took: float, timed: float) -> Effort:
        """With blocks as much shorter as a second round needs to end within the limit, after a first that took so long.

        Of what the first took, `timed` seconds were blocks: no more can be saved. A third of a block is kept.
        """
        over = 2 * took - self.limit
        kept = min(1.0, max(1 / 3, 1 - over / timed)) if over > 0 and timed > 0 else 1.0
        return replace(self, seconds=kept * self.seconds)


@dataclass
class Measured:
    """What came of a party: blocks by arm, why others have none, and the stages of a call where they were asked for."""

    party: Party
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stages: Stages | None = None

    def joined(self, later: Measured) -> Measured:
        """With the blocks of a later round; an arm counts that ran in both."""
        both = {name: [*found, *later.blocks[name]] for name, found in self.blocks.items() if name in later.blocks}
        return Measured(self.party, both, {**later.skipped, **self.skipped}, self.stages)


@dataclass
class Turns(Measured):
    """A party while it is measured, with its arms that run."""

    arms: dict[str, Arm] = field(default_factory=dict)

    async def take(self, number: int, round_: int, seconds: float) -> None:
        """One block of each arm, in the order of this turn.

        An arm that raises is left out from then on, with all its blocks: the others go on.
        """
        where = self.party.condition
        for name in turn(list(self.arms), number):
            try:
                found = await block(self.arms[name], _rows(where), where.in_flight, seconds)
                self.blocks.setdefault(name, []).append(replace(found, round=round_))
            except Exception as error:  # noqa: BLE001 (an arm stands on foreign code)
                self.skipped[name] = f"it raised {_words(error)}"
                self.blocks.pop(name, None)
                del self.arms[name]


Key = tuple[str, str, str]
"""An arm, a layer and a dtype."""


@dataclass
class Session:
    """Arms that run, on one event loop; a context manager that ends them all."""

    effort: Effort
    say: Callable[[str], None]
    versions: dict[str, str] = field(default_factory=dict)
    timed: float = 0.0
    """Seconds that blocks took."""

    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _running: dict[Key, Arm] = field(default_factory=dict)
    _refused: dict[Key, str] = field(default_factory=dict)
    _ray: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        for key in list(self._running):
            self._end(key)
        self._ray.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def run(
        self,
        group: Sequence[Party],
        *,
        blocks: int | None = None,
        round_: int = 0,
        staged: Collection[Condition] = (),
        between: Callable[[], None] = lambda: None,
    ) -> list[Measured]:
        """Measure parties whose arms can run at once, with so many blocks for each arm (by default all of the effort).

        Parties take turns, and within a party its arms; `between` is called after each turn of all parties. A call is
        taken apart under the conditions in `staged`, which name one call at a time.
        """
        self._make_room(group)
        opened = [self._opened(party) for party in group]
        begin = time.monotonic()
        for number in range(self.effort.blocks if blocks is None else blocks):
            for one in opened:
                self._loop.run_until_complete(one.take(number, round_, self.effort.seconds))
            between()
        self.timed += time.monotonic() - begin
        left = set(staged)
        for one in opened:
            where = alone(one.party.condition)
            if where in left and STAGED in one.arms:
                left.remove(where)
                apart = taken_apart(one.arms[STAGED], _rows(where), self.effort.seconds)
                one.stages = self._loop.run_until_complete(apart)
            one.arms.clear()  # they end before what came of them is used
        return list(opened)

    def _opened(self, party: Party) -> Turns:
        """A party with its arms running, their answers compared, and each warmed up."""
        opened = Turns(party)
        where = party.condition
        keys = {name: (name, where.shape, where.dtype) for name in party.arms}
        for key in keys.values():
            self._start(key)
        for name, key in keys.items():
            why = self._refused.get(key) or self._differs(self._running[key], where)
            if why:
                opened.skipped[name] = why
                self.say(f"skipped {name}: {why}")
            else:
                opened.arms[name] = self._running[key]
        self.say(f"{where}: {', '.join(opened.arms)}")
        self._loop.run_until_complete(opened.take(0, 0, min(self.effort.seconds, WARM_SECONDS)))
        opened.blocks = {name: [] for name in opened.arms}
        return opened

    def _make_room(self, group: Sequence[Party]) -> None:
        """End the arms for which there is no room beside those of a group."""
        wanted = {name for party in group for name in party.arms}
        shape, dtype = group[0].condition.shape, group[0].condition.dtype
        same = [key[0] for key in self._running if key[1:] == (shape, dtype)]
        spared = {(name, shape, dtype) for name in spare(same, wanted, shape)}
        for key in [key for key in self._running if key[1:] != (shape, dtype) or key in spared]:
            self._end(key)
        if not any(name in ON_RAY for name in (*wanted, *(key[0] for key in self._running))):
            self._ray.close()

    def _start(self, key: Key) -> None:
        if key in self._running or key in self._refused:
            return
        name, shape, dtype = key
        self.say(f"starting {name} ({shape} {dtype})")
        try:
            if name in ON_RAY:
                self._ray.enter_context(private_ray())
            self._running[key] = arm = catalogue.start(name, SHAPES[shape], DTYPES[dtype])
            self.versions[name] = arm.version
        except (ArmUnavailable, ImportError, RuntimeError) as error:  # the last is what Ray's libraries raise
            self._refused[key] = _words(error)

    def _differs(self, arm: Arm, where: Condition) -> str:
        """Why an arm is not to be timed, by its answer to the rows; nothing if it is that of the reference."""
        try:
            answer_TD = self._loop.run_until_complete(arm.call(_rows(where)))
            apart = difference(answer_TD, wanted(arm, where))
        except Exception as error:  # noqa: BLE001 (an arm stands on foreign code)
            return f"it raised {_words(error)}"
        good = apart <= TOLERANCE[DTYPES[where.dtype]]
        return "" if good else f"its answer differs from the reference by {apart:.1e}"

    def _end(self, key: Key) -> None:
        self._running.pop(key).close()
        self._loop.run_until_complete(asyncio.sleep(0))  # what it cancelled ends


def wanted(arm: Arm, where: Condition) -> Tensor:
    """What an arm has to answer: the layer, or what it says of itself: its rows (`echoes`) or one expert (`expert`)."""
    shape, dtype, x_TD = SHAPES[where.shape], DTYPES[where.dtype], _rows(where)
    if getattr(arm, "echoes", False):
        return x_TD
    index = getattr(arm, "expert", None)
    with torch.inference_mode():
        answer_TD: Tensor = reference(shape, dtype)(x_TD) if index is None else expert(shape, index, dtype)(x_TD)
    return answer_TD


def _words(error: Exception) -> str:
    """The last line of an error: an arm's ends with why."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__


def _rows(where: Condition) -> Tensor:
    return rows(SHAPES[where.shape], where.rows, DTYPES[where.dtype])
