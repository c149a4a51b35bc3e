"""What a client has seen of a cluster: its highest epoch, so that no later call is answered from an older one."""

from __future__ import annotations

import threading
from typing import Any


class SeenEpoch:
    """The highest epoch of the cluster that was met last. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cluster = ""
        self._epoch = 0

    def note(self, cluster: str, epoch: int) -> None:
        """Take the epoch of a reply; another cluster than before makes what was seen of that one meaningless."""
        if not cluster:
            return
        with self._lock:
            self._epoch = max(epoch, self._epoch) if cluster == self._cluster else epoch
            self._cluster = cluster

    def options(self) -> dict[str, Any]:
        """What a call says of it."""
        with self._lock:
            return {"min_epoch": self._epoch, "cluster": self._cluster}
