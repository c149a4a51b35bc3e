"""Swaps as an experiment makes them: one expert, a set, a set with the gate; carried out, counted, written down."""

from __future__ import annotations

import random
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertmesh import errors

from .figures import between, say
from .load import Load, SeenEpoch
from .mesh import Mesh

KINDS = ("one", "set", "one", "one", "gate", "one", "set", "one", "one", "set")
"""Ten swaps: six of one expert, three of a set, one of a set with the gate."""

DRAINING_PAUSE = 0.02
PACE = 0.95
"""The share of its time over which swaps are spread, so that one that takes long does not push out the last."""


@dataclass
class Made:
    """A swap that is ready to be asked for."""

    kind: str
    paths: dict[str, Path]
    tensors: dict[str, Any]
    swap_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Swapper:
    """Asks for swaps and keeps what came of them; `seconds` are those of committed swaps, from ask to answer.

    A swap that is told that the one before is still draining is asked for again as a new one, and counted.
    """

    mesh: Mesh
    committed: list[Made] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    draining: int = 0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "swap"))

    def count(self, *kinds: str) -> int:
        """How many swaps of these kinds were committed."""
        return sum(made.kind in kinds for made in self.committed)

    def begin(self, made: Made, timeout: float) -> Future[str]:
        """Carry out a swap in a thread of its own."""
        return self._thread.submit(self.swap, made, timeout)

    def swap(self, made: Made, timeout: float = 30.0) -> str:
        """Carry out a swap, and write into the ledger what was acknowledged.

        Returns "committed", "aborted", or what else it ended with.
        """
        until = time.monotonic() + timeout
        while True:
            started = time.monotonic()
            try:
                outcome = self.mesh.client.swap(made.paths, swap_id=made.swap_id, timeout=timeout)
            except errors.Aborted as error:
                if "draining" not in error.message or time.monotonic() > until:
                    self.refused.append(f"{made.kind}: {error}")
                    return "aborted"
                self.draining += 1
                made.swap_id = uuid.uuid4().hex
                time.sleep(DRAINING_PAUSE)
            except errors.ExpertMeshError as error:
                self.refused.append(f"{made.kind}: {type(error).__name__}: {error}")
                return f"{type(error).__name__}: {error}"
            else:
                self.seconds.append(time.monotonic() - started)
                self.mesh.ledger.committed(outcome.epoch, outcome.after, made.tensors)
                self.committed.append(made)
                self.epochs.append(outcome.epoch)
                return "committed"

    def say(self, wanted: int, seconds: float) -> list[str]:
        """Print how many swaps were committed, and why others were not; a problem if they are fewer than wanted."""
        say("committed swaps", len(self.committed), f"{wanted} in {seconds:.1f} s")
        say("  of them sets, with the gate", f"{self.count('set', 'gate')}, {self.count('gate')}")
        say("  asked again while draining", self.draining)
        for refusal in self.refused[:3]:
            print(f"    swap refused: {refusal}")
        missing = len(self.committed) < wanted
        return [f"only {len(self.committed)} of {wanted} swaps were committed"] if missing else []


@dataclass(frozen=True)
class Swapped:
    """What came of swaps under load; the times are when the quiet, the swaps, the quiet again began, and the end."""

    load: Load
    swapper: Swapper
    times: tuple[float, float, float, float]

    @property
    def steady(self) -> list[SeenEpoch]:
        """The requests that were due in the quiet before and after."""
        return [*between(self.load.seen, *self.times[:2]), *between(self.load.seen, *self.times[2:])]

    @property
    def during(self) -> list[SeenEpoch]:
        """The requests that were due while swaps were made."""
        return between(self.load.seen, *self.times[1:3])


def swapped(mesh: Mesh, swaps: list[Made], load: Load, *, quiet: float, seconds: float, least: float = 0.0) -> Swapped:
    """Swaps one after the other under a load, spread over `seconds`, with so much quiet before and after.

    Those that are left after `seconds` are not asked for. The part with swaps lasts `least` seconds.
    """
    swapper = Swapper(mesh)
    with load:
        begin = time.monotonic()
        time.sleep(quiet)
        first = time.monotonic()
        for number, made in enumerate(swaps):
            now = time.monotonic() - first
            if now < seconds:
                time.sleep(max(0.0, number * PACE * seconds / len(swaps) - now))
                swapper.swap(made)
        time.sleep(max(0.0, first + least - time.monotonic()))
        last = time.monotonic()
        time.sleep(quiet)
    return Swapped(load, swapper, (begin, first, last, last + quiet))


def make_swap(mesh: Mesh, kind: str, draw: random.Random) -> Made:
    """The files of one swap."""
    experts = list(mesh.shape.expert_ids)
    size = 1 if kind == "one" else draw.randint(2, min(4, len(experts)))
    ids = draw.sample(experts, size) + ([mesh.shape.gate_id] if kind == "gate" else [])
    made = {id: mesh.make(id) for id in ids}
    return Made(kind, {id: path for id, (path, _) in made.items()}, {id: value for id, (_, value) in made.items()})
