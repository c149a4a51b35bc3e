"""A scenario: something that breaks, what is promised for it, and what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Seen:
    """What one scenario saw: each figure in words, and what was not as promised."""

    figures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def note(self, figure: str, kept: bool = True) -> None:
        """Add a figure; one that breaks a promise is listed again as such."""
        self.figures.append(figure)
        if not kept:
            self.broken.append(figure)


@dataclass(frozen=True)
class Scenario:
    """A name, the promise in words, and the function that provokes the fault and looks."""

    name: str
    promise: str
    run: Callable[[], Seen]
