"""Continuous requests from a few threads; every answer is checked against the versions that it names."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import ExpertMeshError
from ..client.client import Client
from ..client.reply import Reply

THREADS = 2
ROWS = 8
PAUSE = 0.01
"""Seconds between two requests of a thread: the traffic shows swaps and should not saturate the machine."""


@dataclass(frozen=True, kw_only=True)
class TrafficReport:
    """The outcome of all requests. `mixed` counts answers whose versions differ from an earlier answer of their epoch.

    `p99` is the 99th percentile of the latency by phase, in milliseconds.
    """

    sent: int
    failed: int
    wrong: int
    mixed: int
    p99: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether requests were sent, and all of them were answered correctly."""
        return self.sent > 0 and self.failed == self.wrong == self.mixed == 0


class Traffic:
    """A context manager that sends requests from background threads until it exits.

    `judge(rows, reply)` returns whether a reply to these rows is what its versions compute.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, client: Client, layer: str, rows: Tensor, judge: Callable[[Tensor, Reply], bool]) -> None:
        self._client = client
        self._layer = layer
        self._rows = torch.split(rows, ROWS)
        self._judge = judge
        self._counter = itertools.count()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._phase = "steady"
        self._replies: list[tuple[int, Reply]] = []
        self._latencies: dict[str, list[float]] = {}
        self._sent = 0
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def phase(self, name: str) -> None:
        """Count latencies of further requests under this phase."""
        self._phase = name

    def settle(self, requests: int = 200, seconds: float = 10.0) -> None:
        """Wait until `requests` more requests are answered, for at most `seconds`."""
        target, deadline = len(self._replies) + requests, self.clock() + seconds
        while len(self._replies) < target and self.clock() < deadline and not self._stop.wait(0.01):
            pass

    def report(self) -> TrafficReport:
        """Check every answer. Call it after the context has exited."""
        wrong = sum(not self._judge(self._rows[number], reply) for number, reply in self._replies)
        return TrafficReport(
            sent=self._sent,
            failed=self._sent - len(self._replies),
            wrong=wrong,
            mixed=self._count_mixed(),
            p99={phase: percentile(seconds, 0.99) * 1000 for phase, seconds in self._latencies.items()},
        )

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            number = next(self._counter) % len(self._rows)
            phase, started = self._phase, self.clock()
            with self._lock:
                self._sent += 1  # a call that ends without a reply counts as failed
            try:
                reply = self._client.call(self._layer, self._rows[number])
            except ExpertMeshError:
                continue
            with self._lock:
                self._replies.append((number, reply))
                self._latencies.setdefault(phase, []).append(self.clock() - started)

    def _count_mixed(self) -> int:
        epochs: dict[int, dict[str, str]] = {}
        mixed = 0
        for _, reply in self._replies:
            versions = epochs.setdefault(reply.epoch, {})
            mixed += any(versions.setdefault(id, version) != version for id, version in reply.versions.items())
        return mixed


def percentile(values: list[float], share: float) -> float:
    """The smallest value that more than `share` of the values do not exceed; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
