"""Actors in the place of the product's: they note when an epoch came, die at a step of a swap, or break a rule.

`chaos_mesh(actors=...)` sends them; no switch in the product does this. Death by SIGKILL from within is the same as
from outside, and happens exactly where it is asked for. A rule is broken on purpose: what checks the real actors must
notice, or it proves nothing. Import this module in a process only after Ray's environment was set.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.cluster.control.events import StageCandidate, UnloadVersion
from expertmesh.cluster.control.executor import Executor
from expertmesh.cluster.control.messages import SwapRequest, proposal_of
from expertmesh.cluster.control.ports import StateSettings
from expertmesh.cluster.control.swap_transactions import SwapTransactions
from expertmesh.cluster.runtime.ray_actors import ControllerActor, ExpertActor, RouterActor
from expertmesh.cluster.state.records import VersionRecord
from expertmesh.experts.errors import ExpertMeshError
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import Part
from expertmesh.experts.staging.stage import Receipt
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.request.forward import Router

from . import signals

LATE_SECONDS = 0.3


class NotingRouter(Router):
    """Notes each epoch that it adopts."""

    def adopt(self, epoch: Epoch) -> bool:
        newer = super().adopt(epoch)
        if newer:
            signals.note(signals.flip_file(), epoch.number)
        return newer


class NotingTransactions(SwapTransactions):
    """Notes each epoch that it commits."""

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        committed = super().commit(swap_id, versions)
        signals.note(signals.commit_file(), committed[0])
        return committed


class CrashingTransactions(SwapTransactions):
    """Dies in the middle of its paperwork."""

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
        self.die_at(signals.JOURNALLED)

    def keep_receipt(self, swap_id: str, receipt: Receipt) -> None:
        super().keep_receipt(swap_id, receipt)
        self.die_at(signals.STAGING)

    def write(self, swap_id: str, versions: Mapping[str, str]) -> None:
        self.die_at(signals.READY)
        super().write(swap_id, versions)

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        committed = super().commit(swap_id, versions)
        self.die_at(signals.COMMITTED)
        return committed

    def answer(self, swap_id: str, epoch: int | None, error: ExpertMeshError | None) -> None:
        if epoch is not None:
            self.die_at(signals.FLIPPED)
        super().answer(swap_id, epoch, error)

    def _write(self, *version: Any) -> VersionRecord:
        record = super()._write(*version)
        self.die_at(signals.STORED)
        return record


class CrashingExecutor(Executor):
    """Dies when it begins to retire what a swap has replaced."""

    async def _unload(self, action: UnloadVersion) -> None:
        if isinstance(self.transactions, CrashingTransactions):
            self.transactions.die_at(signals.RETIRING)
        await super()._unload(action)


class NotingRouterActor(RouterActor):
    """The actor of a router that notes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._service.router.__class__ = NotingRouter


class NotingControllerActor(ControllerActor):
    """The actor of a controller that notes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._opening.get().transactions.__class__ = NotingTransactions


class CrashingControllerActor(ControllerActor):
    """The actor of a controller that dies."""

    def __init__(self, settings: StateSettings, *given: Any) -> None:
        super().__init__(settings, *given)
        self._opening.get().executor.__class__ = CrashingExecutor
        transactions = self._opening.get().transactions
        transactions.__class__ = CrashingTransactions
        vars(transactions)["crash"] = signals.crash_file(settings.state_dir)


class FlipsEarly(Executor):
    """Makes the receipts of the replicas itself, and has them stage only later: so it flips before they have."""

    async def _stage(self, action: StageCandidate) -> None:
        if action.member in self.routers:
            await super()._stage(action)
            return
        member, incarnation, swap_id, id = action.member, action.incarnation, action.swap_id, action.id
        candidate = self.transactions.candidate(swap_id, id)
        if candidate is None:
            return
        proposal = replace(proposal_of(candidate), weights=candidate.weights)
        try:
            receipt = await asyncio.to_thread(ExpertHost().stage, proposal)
        except ExpertMeshError as error:
            await self.perform(self.reconciler.stage_refused(swap_id, member, incarnation, id, error))
            return
        self.transactions.keep_receipt(swap_id, receipt)
        self._holds(member, incarnation, id, receipt.version)
        await self.perform(self.reconciler.staged(swap_id, member, incarnation, id, receipt.version))
        await asyncio.sleep(LATE_SECONDS)
        await self._staged_at(member, self.transactions.recorded(id, receipt.version), LATE_SECONDS)


class AnswersWithNewest(ExpertHost):
    """Computes with the newest version that it has where it does not hold the one that was asked for."""

    def _part(self, part: Part, *rows: Any, **options: Any) -> Any:
        held = [version for id, version in self._slots if id == part.expert]
        if held and part.version not in held:
            newest = max(held, key=lambda version: int(version[1:].partition("-")[0]))
            part = replace(part, version=newest)
        return super()._part(part, *rows, **options)


class EarlyController(ControllerActor):
    """A controller that flips before its replicas have staged."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._opening.get().executor.__class__ = FlipsEarly


class NewestExpert(ExpertActor):
    """A replica that answers with another version than it was asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._host.__class__ = AnswersWithNewest
