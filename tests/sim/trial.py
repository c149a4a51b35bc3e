"""Runs seeds and adds up what was seen: the same for the tests and for `make sim`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sim.checker import Breach
from sim.faults import CELLS, Cell
from sim.world import KINDS, Broken, World

TRUE_RULES = Broken()


@dataclass
class Tally:
    """What some seeds showed."""

    seeds: int = 0
    events: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    hit: Counter[Cell] = field(default_factory=Counter)
    breaches: dict[int, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Take in what other seeds showed."""
        self.seeds += other.seeds
        self.events += other.events
        self.counts += other.counts
        self.hit += other.hit
        self.breaches |= other.breaches

    def missed(self) -> list[Cell]:
        """The steps and actors at which no crash happened."""
        return [cell for cell in CELLS if not self.hit[cell]]


def run(seeds: Iterable[int], rules: Broken = TRUE_RULES) -> Tally:
    """Run worlds; a broken promise ends its own world alone."""
    tally = Tally()
    for seed in seeds:
        world = World(seed, rules)
        try:
            world.run()
        except Breach as breach:
            tally.breaches[seed] = f"{world.kind}: {breach}"
        tally.seeds += 1
        tally.events += world.clock.events
        tally.counts += world.checker.counts
        tally.hit += world.faults.hit
    return tally


def seeds_of(kind: str | None, count: int, first: int = 0) -> list[int]:
    """The default seeds from `first` up to `count`, of one kind of world or of all."""
    return [seed for seed in range(first, count) if kind is None or KINDS[seed % len(KINDS)] == kind]


def breaks(rules: Broken, promise: str, seeds: Iterable[int]) -> bool:
    """Whether one of these seeds breaks a promise under these rules."""
    return any(promise in found for seed in seeds for found in run([seed], rules).breaches.values())


def fingerprint(seed: int) -> str:
    """A digest of every message of a world: equal in every process, or a failing seed could not be replayed."""
    world = World(seed)
    digest = hashlib.sha256()
    world.network.tell = lambda text: digest.update(f"{world.clock.now!r} {_sorted(text)}".encode())
    world.run()
    return digest.hexdigest()


def _sorted(text: str) -> str:
    """A message without the order in which Python happens to print its sets."""
    return "".join(sorted(text))
