"""Runs in hivemind's environment: asks a server of experts, and prints what it saw as JSON lines.

Arguments: ADDRESS EXPERTS WIDTH ROWS SECONDS. The last line is {"what": "end"}.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

IN_FLIGHT = 4
PATIENCE = 60.0
MOST_SCORES = 2048
"""Scores of a call of the layer. Beyond 16 KiB a message to its DHT process goes in two pieces, and the reader, which
does not wait for the second, dies (BlockingIOError): the layer would hang."""


def main() -> None:
    """Measure, and print."""
    address = sys.argv[1]
    experts, width, rows = (int(word) for word in sys.argv[2:5])
    seconds = float(sys.argv[5])
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    torch.set_num_threads(1)
    import hivemind
    from hivemind.moe.server.dht_handler import get_experts

    dht = hivemind.DHT(initial_peers=[address], start=True)
    try:
        with os.fdopen(answer, "w", encoding="utf-8") as told, torch.no_grad():

            def say(**found: Any) -> None:
                print(json.dumps(found), file=told, flush=True)

            expert = _found(lambda: get_experts(dht, ["ffn.0"])[0])
            version = f"hivemind {hivemind.__version__}, torch {torch.__version__}"
            for count in (rows, 1):
                x_TD = torch.randn(count, width)
                for in_flight in (1, IN_FLIGHT):
                    figures = _measured(lambda x_TD=x_TD: expert(x_TD), count, in_flight, seconds)  # type: ignore[misc]
                    say(what="expert", version=version, rows=count, in_flight=in_flight, **figures)
            layer = hivemind.RemoteMixtureOfExperts(
                in_features=width, grid_size=(experts,), dht=dht, uid_prefix="ffn.", k_best=2, forward_timeout=PATIENCE
            )
            parts = torch.split(torch.randn(rows, width), MOST_SCORES // experts)
            figures = _measured(lambda: torch.cat([layer(part_TD) for part_TD in parts]), rows, 1, seconds)
            say(what="layer", version=version, rows=rows, in_flight=1, **figures)
            say(what="end")
    finally:
        dht.shutdown()


def _measured(call: Callable[[], Any], rows: int, in_flight: int, seconds: float) -> dict[str, float]:
    """Median latency in seconds, and rows a second, with calls from `in_flight` threads; after one to warm up."""
    call()
    begin = time.perf_counter()

    def caller(_: int) -> list[float]:
        times: list[float] = []
        with torch.no_grad():
            while time.perf_counter() < begin + seconds or not times:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return times

    with ThreadPoolExecutor(in_flight) as threads:
        times = [one for some in threads.map(caller, range(in_flight)) for one in some]
    rate = len(times) * rows / (time.perf_counter() - begin)
    return {"p50": statistics.median(times), "rows_per_second": rate, "calls": len(times)}


def _found(look: Callable[[], Any]) -> Any:
    """What `look` finds, once it finds something: experts are declared in the background."""
    deadline = time.monotonic() + PATIENCE
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server declared no expert within {PATIENCE:g} s")
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    main()
