"""When the controller is opened, and opened again: a registry that could not be opened may recover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ...experts.errors import ExpertMeshError

FIRST_WAIT = 1.0
LONGEST_WAIT = 15.0
T = TypeVar("T")


class Opening(Generic[T]):
    """Opens something when it is asked for, and after a failure again, after 1 to 15 seconds.

    `open` raises an ExpertMeshError where that fails; `clock` returns monotonic seconds.
    """

    def __init__(self, open: Callable[[], T], clock: Callable[[], float]) -> None:
        self._open = open
        self._clock = clock
        self._opened: T | None = None
        self._failure: ExpertMeshError | None = None
        self._wait = FIRST_WAIT
        self._next = 0.0

    @property
    def opened(self) -> T | None:
        """What was opened, or None so far."""
        return self._opened

    @property
    def problem(self) -> str:
        """Why it is not open; empty if it is."""
        return "" if self._failure is None else self._failure.message

    def get(self) -> T:
        """What was opened, perhaps just now. Raises the error of the last try."""
        if self._opened is not None:
            return self._opened
        if self._failure is not None and self._clock() < self._next:
            raise type(self._failure)(self._failure.message)
        try:
            self._opened = self._open()
        except ExpertMeshError as error:
            self._failure, self._next = error, self._clock() + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            raise
        self._failure = None
        return self._opened
