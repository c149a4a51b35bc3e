"""How much memory a call holds at once: of 4 MiB in one message, of 16 MiB in chunks; see `measured`.

tracemalloc is stopped here while no other thread runs: in Python before 3.12.9 that may crash beside threads of gRPC's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from expertmesh.cluster.client.calls import Calls
from expertmesh.cluster.client.retry import Answer, Attempt, Step, drive
from expertmesh.cluster.rpc.streams import Streamed, StreamedAnswer
from expertmesh.experts import wire

MIB = 2**20


def measured() -> dict[str, list[float]]:
    """By name: the most that was held beside the caller's rows, and what was left at the end."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, list[float]] = json.loads(run.stdout)
    return found


def _measure(work: Callable[[], Any], nbytes: int) -> list[float]:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = work()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return [(peak - before) / nbytes, (after - before) / nbytes]


def _call(stream: bool) -> list[float]:
    x = np.ones((16 if stream else 4, MIB // 4), np.float32)  # one message has at most 4 MiB
    meta = {"request_id": "r", "epoch": 1, "versions": {}}
    reply = wire.encode_parts("reply", meta, {"output": wire.WireTensor.from_numpy(x)})

    def perform(step: Step) -> Answer:
        """A server of no memory of its own, but for what gRPC would hand over."""
        assert isinstance(step, Attempt)
        if isinstance(step.payload, bytes):
            return b"".join(reply)
        for _ in step.payload.messages():
            pass
        return _received(Streamed(reply))

    calls = Calls(token="t")
    return _measure(lambda: drive(calls.forward("l", x, stream=stream), perform), x.nbytes)


def _received(streamed: Streamed) -> memoryview:
    answer = StreamedAnswer(streamed.most)
    for message in streamed.messages():
        answer.take(message)
    return answer.finish()


if __name__ == "__main__":
    data = np.random.default_rng(1).integers(0, 255, 16 * MIB, dtype=np.uint8)
    found = {"message": _call(False), "stream": _call(True)}
    found["put together"] = _measure(lambda: _received(Streamed([data.data])), data.nbytes)
    print(json.dumps(found))
