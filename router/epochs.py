"""Epochs: numbered, immutable maps of who answers with which version; a request pins one and keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..experts.errors import Unavailable


@dataclass(frozen=True)
class Epoch:
    """One immutable map {expert or gate id -> version} over all layers, with the layers' definitions."""

    number: int
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)


class Epochs:
    """The epochs that a router knows: the current one, and older ones while a request still pins them."""

    def __init__(self) -> None:
        self._current: Epoch | None = None
        self._pins: dict[int, int] = {}

    @property
    def current(self) -> Epoch:
        """The epoch that new requests pin. Raises Unavailable before the first one was adopted."""
        if self._current is None:
            raise Unavailable("the router has not been told its layers yet; retry in a moment")
        return self._current

    @property
    def number(self) -> int:
        """The number of the current epoch; 0 before the first."""
        return 0 if self._current is None else self._current.number

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one, in one assignment; False, and no change, if it is not newer."""
        if epoch.number <= self.number:
            return False
        self._current = epoch
        return True

    def pin(self) -> Epoch:
        """Pin the current epoch for one request."""
        epoch = self.current
        self._pins[epoch.number] = self._pins.get(epoch.number, 0) + 1
        return epoch

    def unpin(self, epoch: Epoch) -> None:
        """Give back one pin."""
        left = self._pins[epoch.number] - 1
        if left:
            self._pins[epoch.number] = left
        else:
            del self._pins[epoch.number]

    def pins(self) -> dict[int, int]:
        """How many requests pin each epoch, by number; epochs without pins are left out."""
        return dict(self._pins)

    def oldest_pinned(self) -> int:
        """The oldest epoch that a request pins, or else the current one."""
        return min(self._pins, default=self.number)
