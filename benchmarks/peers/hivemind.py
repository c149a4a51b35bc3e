"""hivemind, in an environment of its own: one of its FFN experts, and its mixture of experts, in fp32.

It is no arm: server and client run in that environment, and the client measures, one block when it is asked. The server
computes in one process with all cores; the client's torch has one thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from .arm import ArmUnavailable
from .helper import Helper
from .hivemind_venv import python


class Hivemind:
    """A running server of `experts` experts, and a client; close it.

    Raises ArmUnavailable, with the reason, where hivemind cannot be installed or started here.
    """

    def __init__(self, *, experts: int = 8, width: int = 1024) -> None:
        interpreter, cores = python(), os.cpu_count() or 1
        size = (str(experts), str(width))
        with ExitStack() as started:
            server = Helper(
                f"{__package__}.hivemind_server", *size, str(cores), python=interpreter, environment=_environment(cores)
            )
            started.enter_context(closing(server))
            self._client = Helper(
                f"{__package__}.hivemind_client", server.said, *size, python=interpreter, environment=_environment(1)
            )
            started.enter_context(closing(self._client))
            self.version: str = json.loads(self._client.said)["version"]
            self._ends = started.pop_all()

    def block(self, what: str, rows: int, in_flight: int, seconds: float) -> dict[str, float]:
        """What the client saw over about so many seconds: `p50` in seconds, `rows_per_second`.

        `what` is "expert" or "layer"; the rate is the better one of one call and of `in_flight` at a time. Raises
        ArmUnavailable where the client has ended.
        """
        asked: dict[str, Any] = {"what": what, "rows": rows, "in_flight": in_flight, "seconds": seconds}
        line = self._client.ask(json.dumps(asked))
        if not line:
            raise ArmUnavailable("the client of hivemind ended before it had measured everything")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """End both processes."""
        self._ends.close()


def _environment(threads: int) -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HIVEMIND_LOGLEVEL": "ERROR"}
