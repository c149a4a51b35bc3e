"""The highest epoch that a client has seen of a cluster, so that no later call is answered from an older one."""

from __future__ import annotations

import threading
from typing import Any


class SeenEpoch:
    """The highest epoch of the cluster that answered last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cluster = ""
        self._epoch = 0

    def note(self, cluster: str, epoch: int) -> None:
        """Record the epoch of a reply; a reply from another cluster replaces the old epoch."""
        if not cluster:
            return
        with self._lock:
            self._epoch = max(epoch, self._epoch) if cluster == self._cluster else epoch
            self._cluster = cluster

    def options(self) -> dict[str, Any]:
        """The options that a call sends for this."""
        with self._lock:
            return {"min_epoch": self._epoch, "cluster": self._cluster}
