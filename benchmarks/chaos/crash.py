"""A controller that kills itself with SIGKILL at a step of a swap, when a file beside its state says which.

It is the same death as from outside, and happens exactly where it is asked for. Import this module in a process only
after Ray's environment was set.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertmesh.cluster.control.events import UnloadVersion
from expertmesh.cluster.control.executor import Executor
from expertmesh.cluster.control.messages import SwapRequest
from expertmesh.cluster.control.ports import StateSettings
from expertmesh.cluster.control.swap_transactions import SwapTransactions
from expertmesh.cluster.runtime.ray_actors import ControllerActor, LogSettings
from expertmesh.cluster.state.records import VersionRecord
from expertmesh.experts.errors import ExpertMeshError
from expertmesh.experts.staging.stage import Receipt

from .crash_steps import COMMITTED, FLIPPED, JOURNALLED, READY, RETIRING, STAGING, STORED, crash_file


class CrashingTransactions(SwapTransactions):
    """Dies in the middle of a swap."""

    crash: Path

    def die_at(self, step: str) -> None:
        """Die if this is the step that was asked for; only once."""
        try:
            wanted = self.crash.read_text()
        except FileNotFoundError:
            return
        if wanted == step:
            self.crash.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(self, request: SwapRequest) -> None:
        super().prepare(request)
        self.die_at(JOURNALLED)

    def keep_receipt(self, swap_id: str, receipt: Receipt) -> None:
        super().keep_receipt(swap_id, receipt)
        self.die_at(STAGING)

    def write(self, swap_id: str, versions: Mapping[str, str]) -> None:
        self.die_at(READY)
        super().write(swap_id, versions)

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        committed = super().commit(swap_id, versions)
        self.die_at(COMMITTED)
        return committed

    def answer(self, swap_id: str, epoch: int | None, error: ExpertMeshError | None) -> None:
        if epoch is not None:
            self.die_at(FLIPPED)
        super().answer(swap_id, epoch, error)

    def _write(self, *version: Any) -> VersionRecord:
        record = super()._write(*version)
        self.die_at(STORED)
        return record


class CrashingExecutor(Executor):
    """Dies when it begins to retire what a swap has replaced."""

    async def _unload(self, action: UnloadVersion) -> None:
        if isinstance(self.transactions, CrashingTransactions):
            self.transactions.die_at(RETIRING)
        await super()._unload(action)


class CrashingControllerActor(ControllerActor):
    """The actor of such a controller."""

    def __init__(self, settings: StateSettings, logs: LogSettings) -> None:
        super().__init__(settings, logs)
        self._controller.executor.__class__ = CrashingExecutor
        transactions = self._controller.transactions
        transactions.__class__ = CrashingTransactions
        vars(transactions)["crash"] = crash_file(settings.state_dir)
