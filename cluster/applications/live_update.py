"""An update under traffic: requests go on while experts are trained and published, and each answer is checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...experts.errors import ExpertMeshError
from ..client.reply import Reply
from ..rpc.swaps import SwapOutcome

THREADS = 2
PAUSE = 0.005
SETTLED = 20
"""How many answers are waited for before the training and after the publication."""
PATIENCE = 60.0


@dataclass(frozen=True, kw_only=True)
class LiveUpdate:
    """An update while requests were answered: how many, how many of them failed, and how many mixed two versions.

    `versions` are the new versions of the experts that it published, by id; `before` and `after` the quality as served.
    """

    requests: int
    failed: int
    mixed: int
    epochs: int
    versions: Mapping[str, str]
    before: float
    after: float

    @property
    def ok(self) -> bool:
        """Whether new versions were published, and no request failed or mixed versions."""
        return bool(self.versions) and self.requests > 0 and self.failed == self.mixed == 0


def update_live(
    request: Callable[[], Reply], update: Callable[[], Sequence[SwapOutcome]], quality: Callable[[], float]
) -> LiveUpdate:
    """Send requests from two threads while `update` trains and publishes; it returns what its swaps came to.

    `request` makes one call, and `quality` measures what serves. Raises what they raise, failed requests apart.
    """
    before = quality()
    traffic = _Traffic(request)
    try:
        traffic.settle()
        outcomes = update()
        traffic.settle()
    finally:
        traffic.stop()
    versions = {
        id: version
        for outcome in outcomes
        if outcome.committed
        for id, version in outcome.after.items()
        if outcome.before.get(id) != version
    }
    return LiveUpdate(
        requests=traffic.sent, failed=traffic.failed, mixed=traffic.mixed, epochs=len(traffic.epochs),
        versions=versions, before=before, after=quality(),
    )  # fmt: skip


class _Traffic:
    """Requests from background threads; each answer is checked against others of its epoch."""

    def __init__(self, request: Callable[[], Reply]) -> None:
        self.sent = self.failed = self.mixed = 0
        self.epochs: dict[int, dict[str, str]] = {}
        self._request = request
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def settle(self) -> None:
        """Wait for some more requests to end, however they do."""
        with self._answered:
            target, end = self.sent + SETTLED, time.monotonic() + PATIENCE
            while self.sent < target and time.monotonic() < end:
                self._answered.wait(1.0)

    def stop(self) -> None:
        """Wait for the threads to end."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(PAUSE):
            try:
                reply: Reply | None = self._request()
            except ExpertMeshError:
                reply = None
            with self._answered:
                self.sent += 1
                if reply is None:
                    self.failed += 1
                else:
                    known = self.epochs.setdefault(reply.epoch, {})
                    self.mixed += any(known.setdefault(id, own) != own for id, own in reply.versions.items())
                self._answered.notify_all()
