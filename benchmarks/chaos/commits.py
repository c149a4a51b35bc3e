"""A controller that writes down when an epoch became durable, by the clock that all processes of a machine share.

Import this module in a process only after Ray's environment was set.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from expertmesh.cluster.control.ports import StateSettings
from expertmesh.cluster.control.swap_transactions import SwapTransactions
from expertmesh.cluster.runtime.ray_actors import ControllerActor, LogSettings

from .flip_times import commit_file


class NotingTransactions(SwapTransactions):
    """Writes a line for each epoch that it commits."""

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        committed = super().commit(swap_id, versions)
        with commit_file().open("a") as file:
            file.write(f"{committed[0]} {time.monotonic()!r}\n")
        return committed


class NotingControllerActor(ControllerActor):
    """The actor of such a controller."""

    def __init__(self, settings: StateSettings, logs: LogSettings) -> None:
        super().__init__(settings, logs)
        self._controller.transactions.__class__ = NotingTransactions
