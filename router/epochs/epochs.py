"""Epochs: numbered, immutable maps of who answers with which version; a request pins one and keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...experts.errors import Unavailable, VersionGone


@dataclass(frozen=True)
class Epoch:
    """One immutable map {expert or gate id -> version} over all layers, with the layers' definitions.

    `cluster` is the id of the cluster whose epochs are numbered.
    """

    number: int
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""


class Epochs:
    """The epochs that a router knows: the current one, those that were recalled, and those that are pinned."""

    def __init__(self) -> None:
        self._known: dict[int, Epoch] = {}
        self._current = 0
        self._pins: dict[int, int] = {}
        self._kept: frozenset[int] = frozenset()

    @property
    def current(self) -> Epoch:
        """The epoch that new requests pin. Raises Unavailable before the first one was adopted."""
        if not self._current:
            raise Unavailable("the router has not been told its layers yet; retry in a moment")
        return self._known[self._current]

    @property
    def number(self) -> int:
        """The number of the current epoch; 0 before the first."""
        return self._current

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one, in one assignment; False, and no change, if it is not newer."""
        if epoch.number <= self._current:
            return False
        self._known[epoch.number] = epoch
        self._current = epoch.number
        self._forget()
        return True

    def keep(self, recalled: Iterable[Epoch]) -> None:
        """Know these older epochs, so that requests may pin them by number, and no others beside those pinned now."""
        older = {epoch.number: epoch for epoch in recalled if epoch.number < self._current}
        self._known = {**older, **self._known}
        self._kept = frozenset(older)
        self._forget()

    def knows(self, number: int) -> bool:
        """Whether a request may pin the epoch of this number."""
        return number == self._current or number in self._kept

    def pin(self, number: int | None = None) -> Epoch:
        """Pin an epoch for one request, by default the current one.

        Raises VersionGone for a number that is neither current nor kept.
        """
        if number is not None and not self.knows(number):
            raise VersionGone(f"epoch {number} is not loaded here; the current one is {self._current}")
        epoch = self.current if number is None else self._known[number]
        self._pins[epoch.number] = self._pins.get(epoch.number, 0) + 1
        return epoch

    def pin_again(self, epoch: Epoch) -> Epoch:
        """Pin an epoch once more that is pinned already, and so is loaded, also where requests may not name it."""
        self._pins[epoch.number] += 1
        return epoch

    def unpin(self, epoch: Epoch) -> None:
        """Give back one pin."""
        left = self._pins[epoch.number] - 1
        if left:
            self._pins[epoch.number] = left
        else:
            del self._pins[epoch.number]
            self._forget()

    def pins(self) -> dict[int, int]:
        """How many requests pin each epoch, by number; epochs without pins are left out."""
        return dict(self._pins)

    def oldest_pinned(self) -> int:
        """The oldest epoch that a request pins, or else the current one."""
        return min(self._pins, default=self._current)

    def draining(self) -> dict[str, list[str]]:
        """The older versions, by id, that pinned epochs still need beside the current ones."""
        older: dict[str, set[str]] = {}
        for number in self._pins:
            for id, version in self._known[number].versions.items():
                if version != self.current.versions.get(id):
                    older.setdefault(id, set()).add(version)
        return {id: sorted(versions) for id, versions in sorted(older.items())}

    def known(self) -> list[Epoch]:
        """Every epoch that is current, kept or pinned, oldest first."""
        return [self._known[number] for number in sorted(self._known)]

    def _forget(self) -> None:
        needed = {self._current, *self._kept, *self._pins}
        self._known = {number: epoch for number, epoch in self._known.items() if number in needed}
