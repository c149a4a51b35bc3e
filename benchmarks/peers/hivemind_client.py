"""Runs in hivemind's environment: asks a server of experts, block by block, and prints what it saw as JSON lines.

Arguments: ADDRESS EXPERTS WIDTH. Says {"version"} when it is ready. Then each line of its input, {"what", "rows",
"in_flight", "seconds"} with "expert", "layer" or "training", is answered by a line {"p50", "rows_per_second", "calls"}:
the better rate of one and of `in_flight` calls at a time. What was not asked before is called once to warm up. It ends
with its input.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from .helper import speaking
from .measure import calls_per_second

PATIENCE = 60.0
MOST_SCORES = 2048
"""Scores of a call of the layer. Beyond 16 KiB a message to its DHT process goes in two pieces, and the reader, which
does not wait for the second, dies (BlockingIOError): the layer would hang."""


def main() -> None:
    """Measure, and print."""
    address = sys.argv[1]
    experts, width = (int(word) for word in sys.argv[2:4])
    torch.set_num_threads(1)
    with speaking() as say, torch.no_grad():
        import hivemind
        from hivemind.moe.server.dht_handler import get_experts

        dht = hivemind.DHT(initial_peers=[address], start=True)
        try:
            expert = _found(lambda: get_experts(dht, ["ffn.0"])[0])
            layer = hivemind.RemoteMixtureOfExperts(
                in_features=width, grid_size=(experts,), dht=dht, uid_prefix="ffn.", k_best=2, forward_timeout=PATIENCE
            )

            def in_parts(x_TD: torch.Tensor) -> torch.Tensor:
                return torch.cat([layer(part_TD) for part_TD in torch.split(x_TD, MOST_SCORES // experts)])

            say({"version": f"hivemind {hivemind.__version__}, torch {torch.__version__}"})
            warm: set[tuple[str, int]] = set()
            for line in sys.stdin:
                asked = json.loads(line)
                what, rows = asked["what"], asked["rows"]
                x = torch.randn(rows, width)
                call: Callable[[], Any] = partial(expert if what == "expert" else in_parts, x)
                if what == "training":
                    call = partial(_trained, in_parts, x)
                if (what, rows) not in warm:
                    warm.add((what, rows))
                    call()
                found = [_measured(call, rows, count, asked["seconds"]) for count in {1, asked["in_flight"]}]
                say(max(found, key=lambda one: one["rows_per_second"]))
        finally:
            dht.shutdown()


def _trained(layer: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor) -> None:
    """A forward and a backward pass; the server updates its experts, if they have optimizers."""
    with torch.enable_grad():
        torch.autograd.backward(layer(x_TD.requires_grad_(True)).square().mean())


def _measured(call: Callable[[], Any], rows: int, in_flight: int, seconds: float) -> dict[str, float]:
    """Median latency in seconds, and rows a second, with calls from `in_flight` threads; counted as for every arm."""
    times: list[float] = []
    ends: list[float] = []
    deadline = time.perf_counter() + seconds

    def caller(_: int) -> None:
        with torch.no_grad():
            while time.perf_counter() < deadline or len(ends) < 2 * in_flight:
                start = time.perf_counter()
                call()
                ends.append(time.perf_counter())
                times.append(ends[-1] - start)

    with ThreadPoolExecutor(in_flight) as threads:
        list(threads.map(caller, range(in_flight)))
    rate = rows * calls_per_second(sorted(ends), in_flight, deadline)
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
