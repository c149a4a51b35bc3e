"""Actors with a rule broken on purpose: what checks the real ones must notice, or it proves nothing.

They are sent in the place of the real ones by `chaos_mesh(actors=...)`; no switch in the product does this. Import this
module in a process only after Ray's environment was set.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from expertmesh.cluster.control.events import StageCandidate
from expertmesh.cluster.control.executor import ROUTER, Executor
from expertmesh.cluster.control.messages import proposal_of
from expertmesh.cluster.runtime.ray_actors import ControllerActor, ExpertActor
from expertmesh.experts.errors import ExpertMeshError
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import Part

LATE_SECONDS = 0.3


class FlipsEarly(Executor):
    """Makes the receipts of the replicas itself, and has them stage only later: so it flips before they have."""

    async def _stage(self, action: StageCandidate) -> None:
        if action.member == ROUTER:
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
        await self._staged_at(member, self.transactions.recorded(id, receipt.version))


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
        self._controller.executor.__class__ = FlipsEarly


class NewestExpert(ExpertActor):
    """A replica that answers with another version than it was asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._host.__class__ = AnswersWithNewest
