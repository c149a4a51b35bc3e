"""A process that helps an arm: started as a module, it says a JSON line when it is ready and ends with its input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .arm import ArmUnavailable

START_SECONDS = 180.0
STOP_SECONDS = 30.0


class Helper:
    """A running module, with what it said first in `said`.

    Raises ArmUnavailable where it ends, waits without a word or says no JSON, with the end of its standard error.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe: nobody reads it meanwhile
        self._process = subprocess.Popen(
            (python, "-m", module, *map(str, arguments)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.said: Any = self._read()
        if self.said is None:
            self.close()
            raise ArmUnavailable(f"{module} did not start: {self._last_words or 'it said nothing'}")

    def ask(self, question: Mapping[str, Any]) -> Any:
        """What it says to a line on its input, or None when it has ended."""
        try:
            if self._process.stdin:
                self._process.stdin.write(f"{json.dumps(question)}\n")
                self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read()

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

    def _read(self) -> Any:
        """The next thing that it says, or None when it has ended; it is ended if it says nothing for so long."""
        patience = threading.Timer(START_SECONDS, self._process.kill)
        patience.start()
        try:
            return json.loads(self._process.stdout.readline()) if self._process.stdout else None
        except json.JSONDecodeError:  # of the empty line at the end, too
            return None
        finally:
            patience.cancel()


@contextmanager
def speaking() -> Iterator[Callable[[Any], None]]:
    """In the module that helps: says something on standard output, where nothing that libraries print appears."""
    line = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(line, "w", encoding="utf-8") as told:
        yield lambda said: print(json.dumps(said), file=told, flush=True)
