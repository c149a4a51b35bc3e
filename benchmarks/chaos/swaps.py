"""Swaps as an experiment makes them: one expert, a set, a set with the gate; carried out, counted, written down."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertmesh import errors

from .mesh import Files, Mesh

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

    def count(self, *kinds: str) -> int:
        """How many swaps of these kinds were committed."""
        return sum(made.kind in kinds for made in self.committed)

    def swap(self, made: Made, timeout: float = 30.0) -> bool:
        """Carry out a swap, and write into the ledger what was acknowledged."""
        until = time.monotonic() + timeout
        while True:
            started = time.monotonic()
            try:
                outcome = self.mesh.client.swap(made.paths, swap_id=made.swap_id, timeout=timeout)
            except errors.Aborted as error:
                if "draining" not in error.message or time.monotonic() > until:
                    self.refused.append(f"{made.kind}: {error}")
                    return False
                self.draining += 1
                made.swap_id = uuid.uuid4().hex
                time.sleep(DRAINING_PAUSE)
            except errors.ExpertMeshError as error:
                self.refused.append(f"{made.kind}: {type(error).__name__}: {error}")
                return False
            else:
                self.seconds.append(time.monotonic() - started)
                self.acknowledged(made, outcome.epoch, outcome.after)
                return True

    def acknowledged(self, made: Made, epoch: int, after: dict[str, str]) -> None:
        """Write down a swap that was committed."""
        self.mesh.ledger.committed(epoch, after, made.tensors)
        self.committed.append(made)
        self.epochs.append(epoch)


def make_swaps(files: Files, count: int, seed: int = 0) -> list[Made]:
    """The files of so many swaps, written ahead so that this costs nothing while the load runs."""
    draw = random.Random(seed)
    return [make_swap(files, KINDS[number % len(KINDS)], draw) for number in range(count)]


def make_swap(files: Files, kind: str, draw: random.Random) -> Made:
    """The files of one swap."""
    experts = list(files.shape.expert_ids)
    size = 1 if kind == "one" else draw.randint(2, min(4, len(experts)))
    ids = draw.sample(experts, size) + ([files.shape.gate_id] if kind == "gate" else [])
    made = {id: files.make(id) for id in ids}
    return Made(kind, {id: path for id, (path, _) in made.items()}, {id: value for id, (_, value) in made.items()})


def paced(swapper: Swapper, swaps: list[Made], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Carry out swaps one after the other, evenly spread over `seconds`; those that then are left are not asked for."""
    begin = clock()
    for number, made in enumerate(swaps):
        now = clock() - begin
        if now >= seconds:
            return
        time.sleep(max(0.0, number * PACE * seconds / len(swaps) - now))
        swapper.swap(made)
