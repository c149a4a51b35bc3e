"""A process that helps an arm: started as a module, it prints a line when it is ready and ends with its input."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping

from .arm import ArmUnavailable

START_SECONDS = 180.0
STOP_SECONDS = 30.0


class Helper:
    """A running module, with the line that it said first in `said`.

    Raises ArmUnavailable where it ends or waits without a word, with the end of what it wrote on standard error.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        seconds: float = START_SECONDS,
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe: nobody reads it meanwhile
        self._process = subprocess.Popen(
            (python, "-m", module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.said = self.read(seconds)
        if not self.said:
            self.close()
            raise ArmUnavailable(f"{module} did not start: {self._last_words or 'it said nothing'}")

    def read(self, seconds: float = START_SECONDS) -> str:
        """The next line that it says, or nothing when it has ended; it is ended if it says nothing for so long."""
        patience = threading.Timer(seconds, self._process.kill)
        patience.start()
        try:
            return self._process.stdout.readline().strip() if self._process.stdout else ""
        finally:
            patience.cancel()

    def ask(self, line: str) -> str:
        """The line that it says to one on its input, or nothing when it has ended."""
        try:
            if self._process.stdin:
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self.read()

    def close(self) -> None:
        """End it, in good order if it can."""
        try:
            self._process.communicate(timeout=STOP_SECONDS)  # closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.seek(0)
        self._last_words = self._errors.read().strip()[-600:]
        self._errors.close()
