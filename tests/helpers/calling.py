"""Calls without pause from several threads, while something else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable

from helpers.waiting import eventually


class Callers:
    """Calls until the block ends. `call` makes one, told the number of its thread, and returns False if it was refused.

    The first failure ends a thread.
    """

    def __init__(self, call: Callable[[int], object], threads: int = 3) -> None:
        self.answered = 0
        self.failed: list[BaseException] = []
        self._call = call
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._calls, args=(number,)) for number in range(threads)]

    def _calls(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                self.answered += self._call(number) is not False
            except Exception as error:  # noqa: BLE001 (whatever it is, the test fails with it)
                self.failed.append(error)
                return

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def go_on(self) -> None:
        """Wait until some more calls were answered."""
        before = self.answered
        eventually(lambda: self.answered > before + 20 or self.failed, 30, "calls are answered")

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
