"""Crashes: at every step of a swap, of every actor; and by chance."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sim.network import Process

if TYPE_CHECKING:
    from sim.world import World

POINTS = (
    ("prepare", "before"),
    ("prepare", "after"),
    ("stage", "before"),
    ("stage", "after"),
    ("receipt", "before"),
    ("receipt", "after"),
    ("write", "before"),
    ("write", "after"),
    ("commit", "before"),
    ("commit", "after"),
    ("sync", "before"),
    ("sync", "after"),
    ("sync", "reported"),
    ("answer", "before"),
    ("answer", "after"),
    ("unload", "before"),
    ("unload", "after"),
    ("load", "before"),
    ("load", "after"),
)
"""Steps of a swap. "before" and "after" are at the one who acts: who sends a message, who has done it."""

ACTORS = ("controller", "router", "replica")
CELLS = tuple((*point, actor) for point in POINTS for actor in ACTORS)
Cell = tuple[str, str, str]


class Faults:
    """Crashes the actor of each armed cell when its step is reached for the n-th time."""

    def __init__(self, world: World, cells: tuple[Cell, ...]) -> None:
        self.world = world
        self.on = False
        self.hit: Counter[Cell] = Counter()
        self._left = {cell: world.clock.rng.choice((1, 1, 2, 4)) for cell in cells}

    def reached(self, step: str, when: str, process: Process) -> None:
        """A process has come to a step of a swap."""
        if not self.on or not self._left or (step == "sync" and not self.world.swapping):
            return
        for actor in ACTORS:
            cell = (step, when, actor)
            if cell in self._left:
                self._left[cell] -= 1
                if self._left[cell] <= 0 and self._crash(actor, process):
                    self.hit[cell] += 1
                    del self._left[cell]

    def _crash(self, actor: str, process: Process) -> bool:
        victims = [found for found in self.world.alive(actor) if self.world.may_crash(found)]
        if process in victims:
            victims = [process]
        if not victims:
            return False
        self.world.crash(self.world.clock.rng.choice(victims))
        return True
