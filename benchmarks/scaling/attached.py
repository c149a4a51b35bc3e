"""A process with a router of its own, which calls a layer at a rate and writes down each answer as it comes.

`python -m benchmarks.scaling.attached CLUSTER LAYER RATE FILE`; it leaves when its standard input is closed.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.chaos.exact import rows
from benchmarks.chaos.load import POOL, SeenEpoch

import expertmesh

COUNT = 4
SECONDS = 10.0


def main(cluster: str, layer: str, rate: float, file: str) -> None:
    """Call, until standard input ends."""
    inputs, ended = [rows(number, COUNT) for number in range(POOL)], threading.Event()

    def until_told() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=until_told, daemon=True).start()
    with expertmesh.attach(cluster) as router, Path(file).open("a") as lines:
        print(router.name, flush=True)
        number = 0
        while not ended.wait(1.0 / rate):
            sent = time.monotonic()
            try:
                reply = router.call(layer, inputs[number % POOL], timeout=SECONDS)
                told = {
                    "epoch": reply.epoch,
                    "versions": reply.versions,
                    "degraded": reply.degraded,
                    "output": base64.b64encode(np.asarray(reply.output).tobytes()).decode(),
                    "width": reply.output.shape[1],
                }
            except expertmesh.ExpertMeshError as error:
                told = {"error": f"{type(error).__name__}: {error.message[:160]}"}
            line = {"number": number, "sent": sent, "done": time.monotonic(), **told}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            number += 1


class Attached:
    """Such a process, and what it wrote; `seen`, `input` and `count` are as of a load."""

    count = COUNT

    def __init__(self, cluster: str, layer: str, rate: float, file: Path) -> None:
        words = (sys.executable, "-m", "benchmarks.scaling.attached", cluster, layer, str(rate), str(file))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.name = self.process.stdout.readline().strip()
        self._file = file

    @property
    def seen(self) -> list[SeenEpoch]:
        """Every request that was written down whole."""
        return [_seen(json.loads(line)) for line in self._file.read_text().splitlines() if line.endswith("}")]

    def input(self, seen: SeenEpoch) -> Any:
        """The rows of a request."""
        return rows(seen.number % POOL, COUNT)

    def end(self) -> int:
        """Let it leave in good order; returns its exit status."""
        self.process.communicate(timeout=60)
        return self.process.returncode


def _seen(line: dict[str, Any]) -> SeenEpoch:
    times = {"number": line["number"], "due": line["sent"], "sent": line["sent"], "done": line["done"]}
    if "error" in line:
        return SeenEpoch(**times, error=line["error"])
    output = np.frombuffer(base64.b64decode(line["output"]), np.float32).reshape(-1, line["width"])
    reply = SimpleNamespace(epoch=line["epoch"], versions=line["versions"], degraded=line["degraded"], output=output)
    return SeenEpoch(**times, reply=reply)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
