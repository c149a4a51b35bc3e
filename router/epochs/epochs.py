"""Epochs: numbered, immutable maps from experts and gates to versions; a request pins one and keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...experts.errors import RouterUnavailable, VersionGone


@dataclass(frozen=True)
class Epoch:
    """One immutable map {id of an expert, gate or layer -> version} over all layers, with the layers' definitions.

    `cluster` is the id of the cluster that numbers the epochs.
    """

    number: int
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""


class Epochs:
    """The epochs that a router knows: the current one, the recalled ones and the pinned ones."""

    def __init__(self) -> None:
        self._known: dict[int, Epoch] = {}
        self._current = 0
        self._pins: dict[int, int] = {}
        self._kept: frozenset[int] = frozenset()

    @property
    def current(self) -> Epoch:
        """The epoch that new requests pin. Raises RouterUnavailable before the first one is adopted."""
        if not self._current:
            raise RouterUnavailable("the router has not received its layers yet; retry in a moment")
        return self._known[self._current]

    @property
    def number(self) -> int:
        """The number of the current epoch; 0 before the first."""
        return self._current

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one, in one assignment; returns False and changes nothing if it is not newer."""
        if epoch.number <= self._current:
            return False
        self._known[epoch.number] = epoch
        self._current = epoch.number
        self._drop_unneeded()
        return True

    def keep(self, recalled: Iterable[Epoch]) -> None:
        """Keep these older epochs, so that requests can pin them by number; drop every other one that is not pinned."""
        older = {epoch.number: epoch for epoch in recalled if epoch.number < self._current}
        self._known = {**older, **self._known}
        self._kept = frozenset(older)
        self._drop_unneeded()

    def knows(self, number: int) -> bool:
        """Whether a request can pin the epoch with this number."""
        return number == self._current or number in self._kept

    def pin(self, number: int | None = None) -> Epoch:
        """Pin an epoch for one request, by default the current one.

        Raises RouterUnavailable before the first epoch, and VersionGone for a number that is neither current nor kept.
        """
        if number is not None and not self.knows(number):
            raise VersionGone(f"epoch {number} is not loaded here; the current one is {self._current}")
        epoch = self.current if number is None else self._known[number]
        self._pins[epoch.number] = self._pins.get(epoch.number, 0) + 1
        return epoch

    def pin_again(self, epoch: Epoch) -> Epoch:
        """Add a pin to an epoch that is already pinned, and so is loaded, even if requests cannot pin it by number."""
        self._pins[epoch.number] += 1
        return epoch

    def unpin(self, epoch: Epoch) -> None:
        """Release one pin."""
        remaining = self._pins[epoch.number] - 1
        if remaining:
            self._pins[epoch.number] = remaining
        else:
            del self._pins[epoch.number]
            self._drop_unneeded()

    def pins(self) -> dict[int, int]:
        """The number of pins, of requests and leases, on each pinned epoch, by epoch number."""
        return dict(self._pins)

    def oldest_pinned(self) -> int:
        """The number of the oldest pinned epoch, or of the current one if none is pinned."""
        return min(self._pins, default=self._current)

    def draining(self) -> dict[str, list[str]]:
        """The older versions, by id, that pinned epochs still need in addition to the current ones."""
        older: dict[str, set[str]] = {}
        for number in self._pins:
            for id, version in self._known[number].versions.items():
                if version != self.current.versions.get(id):
                    older.setdefault(id, set()).add(version)
        return {id: sorted(versions) for id, versions in sorted(older.items())}

    def known(self) -> list[Epoch]:
        """The current, kept and pinned epochs, oldest first."""
        return [self._known[number] for number in sorted(self._known)]

    def _drop_unneeded(self) -> None:
        needed = {self._current, *self._kept, *self._pins}
        self._known = {number: epoch for number, epoch in self._known.items() if number in needed}
