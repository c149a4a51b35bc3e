"""Runs parties: starts arms once for as long as they are needed, compares their answers, then times them in turns."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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

ON_RAY = ("ray_naive", "ray_good", "ray_good_2", "ray_good_1")
"""Arms whose Ray belongs to this process."""

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


@dataclass(frozen=True)
class Measured:
    """What came of a party: blocks by arm, why others have none, and the stages of a call where they were asked for."""

    party: Party
    blocks: Mapping[str, list[Block]]
    skipped: Mapping[str, str]
    stages: Stages | None = None

    def joined(self, later: Measured) -> Measured:
        """With the blocks of a later round; an arm counts that ran in both."""
        both = {name: [*found, *later.blocks[name]] for name, found in self.blocks.items() if name in later.blocks}
        return Measured(self.party, both, {**later.skipped, **self.skipped}, self.stages)


@dataclass
class _Opened:
    """A party whose arms run, and the blocks that they had until now."""

    party: Party
    arms: dict[str, Arm]
    skipped: dict[str, str]
    seconds: float
    blocks: dict[str, list[Block]] = field(default_factory=dict)

    async def warm(self) -> None:
        """A block of each arm that does not count."""
        for name in list(self.arms):
            if await self._block(name, min(self.seconds, WARM_SECONDS)):
                self.blocks[name] = []

    async def take_turn(self, number: int, round_: int) -> None:
        """One block of each arm, in the order of this turn."""
        for name in turn(list(self.arms), number):
            found = await self._block(name, self.seconds)
            if found:
                self.blocks[name].append(replace(found, round=round_))

    async def _block(self, name: str, seconds: float) -> Block | None:
        """A block of an arm. One that raises is left out from then on, with all its blocks: the others go on."""
        where = self.party.condition
        try:
            return await block(self.arms[name], x_TD=_rows(where), in_flight=where.in_flight, seconds=seconds)
        except Exception as error:  # noqa: BLE001 (an arm stands on foreign code)
            self.skipped[name] = f"it raised {_words(error)}"
            self.blocks.pop(name, None)
            del self.arms[name]
            return None


@dataclass
class Session:
    """Arms that run, on one event loop; a context manager that ends them all."""

    effort: Effort
    say: Callable[[str], None]
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _running: dict[tuple[str, str, str], Arm] = field(default_factory=dict)
    _refused: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _ray: ExitStack = field(default_factory=ExitStack)
    _has_ray: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    timed: float = 0.0
    """Seconds that blocks took."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
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
                self._loop.run_until_complete(one.take_turn(number, round_))
            between()
        self.timed += time.monotonic() - begin
        left = set(staged)
        return [Measured(one.party, one.blocks, one.skipped, self._stages(one, left)) for one in opened]

    def _stages(self, one: _Opened, left: set[Condition]) -> Stages | None:
        """A call taken apart, once under each condition in `left`."""
        where = alone(one.party.condition)
        if where not in left or STAGED not in one.arms:
            return None
        left.remove(where)
        return self._loop.run_until_complete(taken_apart(one.arms[STAGED], _rows(where), self.effort.seconds))

    def _opened(self, party: Party) -> _Opened:
        """A party with its arms running, their answers compared, and each warmed up."""
        arms, skipped = self._arms(party)
        self._check(arms, skipped, party.condition)
        self.say(f"{party.condition}: {', '.join(arms)}")
        opened = _Opened(party, arms, skipped, self.effort.seconds)
        self._loop.run_until_complete(opened.warm())
        return opened

    def close(self) -> None:
        """End all arms."""
        for key in list(self._running):
            self._end(key)
        self._end_ray()

    def _make_room(self, group: Sequence[Party]) -> None:
        """End the arms for which there is no room beside those of a group."""
        wanted = {name for party in group for name in party.arms}
        shape, dtype = group[0].condition.shape, group[0].condition.dtype
        others = [key for key in self._running if key[1:] != (shape, dtype)]
        spared = spare([key[0] for key in self._running if key[1:] == (shape, dtype)], wanted, shape)
        for key in (*others, *((name, shape, dtype) for name in spared)):
            self._end(key)
        if not any(name in ON_RAY for name in (*wanted, *(key[0] for key in self._running))):
            self._end_ray()

    def _arms(self, party: Party) -> tuple[dict[str, Arm], dict[str, str]]:
        """The arms of a party, running, and why the others are not."""
        shape, dtype = party.condition.shape, party.condition.dtype
        for name in party.arms:
            self._start((name, shape, dtype))
        keys = {name: (name, shape, dtype) for name in party.arms}
        running = {name: self._running[key] for name, key in keys.items() if key in self._running}
        return running, {name: self._refused[key] for name, key in keys.items() if key in self._refused}

    def _start(self, key: tuple[str, str, str]) -> None:
        name, shape, dtype = key
        if key in self._running or key in self._refused:
            return
        self.say(f"starting {name} ({shape} {dtype})")
        try:
            if name in ON_RAY and not self._has_ray:
                self._ray.enter_context(private_ray())
                self._has_ray = True
            self._running[key] = arm = catalogue.start(name, SHAPES[shape], DTYPES[dtype])
            self.versions[name] = arm.version
        except (ArmUnavailable, ImportError, RuntimeError) as error:  # the last is what Ray's libraries raise
            self._refused[key] = _words(error)
            self.say(f"skipped {name}: {self._refused[key]}")

    def _check(self, arms: dict[str, Arm], skipped: dict[str, str], where: Condition) -> None:
        """Compare the answer of each arm with the reference; one that differs is not timed."""
        shape, dtype = SHAPES[where.shape], DTYPES[where.dtype]
        x_TD = rows(shape, where.rows, dtype)
        for name, arm in list(arms.items()):
            try:
                apart = difference(self._loop.run_until_complete(_answer(arm, x_TD)), wanted(arm, where))
            except Exception as error:  # noqa: BLE001 (an arm stands on foreign code)
                skipped[name] = f"it raised {_words(error)}"
            else:
                if apart <= TOLERANCE[dtype]:
                    continue
                skipped[name] = f"its answer differs from the reference by {apart:.1e}"
            self.say(f"skipped {name}: {skipped[name]}")
            del arms[name]

    def _end(self, key: tuple[str, str, str]) -> None:
        self._running.pop(key).close()
        self._loop.run_until_complete(asyncio.sleep(0))  # what it cancelled ends

    def _end_ray(self) -> None:
        self._ray.close()
        self._ray, self._has_ray = ExitStack(), False


def wanted(arm: Arm, where: Condition) -> Tensor:
    """What an arm has to answer: the layer, or what it says of itself: its rows (`echoes`) or one expert (`expert`)."""
    shape, dtype = SHAPES[where.shape], DTYPES[where.dtype]
    x_TD = rows(shape, where.rows, dtype)
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


async def _answer(arm: Arm, x_TD: Any) -> Any:
    return await arm.call(x_TD)
