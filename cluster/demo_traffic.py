"""Requests without pause from a few threads, every answer compared with what the versions that it names compute."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts.errors import ExpertMeshError
from .client import Client

THREADS = 3
ROWS = 8
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class TrafficReport:
    """What came of the requests: how many failed or were wrong, and how many answers each version had a part in.

    `latencies` are in seconds, in the order in which the requests ended.
    """

    sent: int
    failed: int
    wrong: int
    answers: Mapping[str, int]
    latencies: tuple[float, ...]

    @property
    def succeeded(self) -> int:
        """Requests that were answered."""
        return self.sent - self.failed


class Traffic:
    """A context in which requests go out without pause.

    `expected` gives the right answer [T, C] to all `rows` for each version of `expert_id`; the key "" stands for any
    version that is not named.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(
        self, client: Client, layer: str, expert_id: str, rows: Tensor, expected: Mapping[str, Tensor]
    ) -> None:
        self._client = client
        self._layer = layer
        self._expert_id = expert_id
        self._rows = torch.split(rows, ROWS)
        self._expected = {version: torch.split(answer, ROWS) for version, answer in expected.items()}
        self._counter = itertools.count()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def settle(self, requests: int = 150, seconds: float = 10.0) -> None:
        """Let so many more requests end, or so much time pass."""
        wanted, deadline = len(self._latencies) + requests, self.clock() + seconds
        while len(self._latencies) < wanted and self.clock() < deadline and not self._stop.wait(0.01):
            pass

    def report(self) -> TrafficReport:
        """What came of it so far."""
        with self._lock:
            return TrafficReport(
                sent=sum(self._outcomes.values()),
                failed=self._outcomes["failed"],
                wrong=self._outcomes["wrong"],
                answers=dict(self._answers),
                latencies=tuple(self._latencies),
            )

    def _run(self) -> None:
        while not self._stop.is_set():
            number = next(self._counter) % len(self._rows)
            started = self.clock()
            try:
                reply = self._client.call(self._layer, self._rows[number])
            except ExpertMeshError:
                self._count("failed", None, self.clock() - started)
                continue
            version = reply.versions.get(self._expert_id)
            self._count(self._judge(number, version, reply.output), version, self.clock() - started)

    def _judge(self, number: int, version: str | None, output: Tensor) -> str:
        if version is None:  # no row of this request needed the expert: then both versions compute the same
            known = next(iter(self._expected.values()))
        else:
            known = self._expected.get(version, self._expected.get("", ()))
        right = bool(known) and torch.allclose(output, known[number], atol=TOLERANCE)
        return "right" if right else "wrong"

    def _count(self, outcome: str, version: str | None, seconds: float) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._latencies.append(seconds)
            if version is not None:
                self._answers[version] += 1
