"""hivemind, in an environment of its own: one of its FFN experts, and its mixture of experts, in fp32.

It is no arm: server and client run in that environment, and the client measures. The server computes in one process
with all cores; the client's torch has one thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from .arm import ArmUnavailable
from .helper import Helper
from .hivemind_venv import python


def measured(*, experts: int = 8, width: int = 1024, rows: int = 512, seconds: float = 3.0) -> list[dict[str, Any]]:
    """What the client saw: `what` ("expert" or "layer"), `rows`, `in_flight`, `p50` in seconds, `rows_per_second`.

    Raises ArmUnavailable, with the reason, where hivemind cannot be installed or started here.
    """
    interpreter = python()
    size = (str(experts), str(width))
    cores = os.cpu_count() or 1
    server = Helper(
        f"{__package__}.hivemind_server", *size, str(cores), python=interpreter, environment=_environment(cores)
    )
    found = []
    with closing(server):
        asked = (server.said, *size, str(rows), str(seconds))
        client = Helper(f"{__package__}.hivemind_client", *asked, python=interpreter, environment=_environment(1))
        with closing(client):
            line = client.said
            while line and (told := json.loads(line))["what"] != "end":
                found.append(told)
                line = client.read()
    if not line:
        raise ArmUnavailable("the client of hivemind ended before it had measured everything")
    return found


def _environment(threads: int) -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HIVEMIND_LOGLEVEL": "ERROR"}
