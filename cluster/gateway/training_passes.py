"""Forward and backward passes: of one replica for each expert, or in slices of several whose gradients are added up.

Which replicas compute the slices of a pass does not matter: their number is the session's, and so are the sums. The
first replica has the candidate, and counts the pass once it is whole; the others have copies of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...experts.errors import InvalidRequest, VersionGone
from ...experts.protocol import TrainReply
from ...experts.training import slices
from ...experts.wire import Frame
from ...router.request.forward import Router
from ...router.training.exchange import Part
from ...router.training.passes import (
    Share,
    folded,
    gradients_of_slices,
    outputs_of,
    slices_of,
    split,
    weighted_sum,
)
from ..rpc.training import TrainAsked
from ..state.training_sessions import SessionRecord
from .training_replicas import TrainingReplicas
from .training_requests import Outcome, added, check_pass, frame_of, needed, parts_of

Answered = list[tuple[Share, TrainReply]]


class TrainingPasses:
    """Computes passes, on the router's event loop."""

    def __init__(self, router: Router, replicas: TrainingReplicas) -> None:
        self._router = router
        self._replicas = replicas

    async def answer(
        self, asked: TrainAsked, tensors: Mapping[str, Tensor], record: SessionRecord | None, timeout: float
    ) -> Frame:
        """A forward or backward pass. Without a session it is computed by versions that serve, named or current."""
        epoch = None
        if record is None:
            layer, epoch = self._router.layer(asked.layer), self._router.epochs.current
            current = {id: epoch.versions[id] for id in layer.everyone_by_id}
            parts = parts_of(asked, None, current)
            kept = {(id, version) for known in self._router.epochs.known() for id, version in known.versions.items()}
            if gone := [part for part in parts if (part[0], part[1]) not in kept]:
                raise VersionGone(f"{gone[0][0]} {gone[0][1][:64]} is of no epoch that is kept: call forward again")
        else:
            parts = parts_of(asked, record, None)
        rows_T, index_N = needed(tensors, "rows"), needed(tensors, "index")
        weights_N, gradients_T = tensors.get("weights"), None
        check_pass(parts, rows_T, index_N, weights_N)
        if asked.op == "backward":
            gradients_T = needed(tensors, "gradients")
            if gradients_T.shape[:1] != rows_T.shape[:1]:
                raise InvalidRequest(
                    f"there are gradients for {list(gradients_T.shape[:1])} rows, but {list(rows_T.shape[:1])} rows"
                )
        meta: dict[str, Any] = {"op": asked.op, "step": asked.step, "seed": asked.seed, "durable": asked.durable}
        meta |= {"training": asked.training, "keep": asked.keep, "of_rows": asked.of_rows}
        one = _Pass(parts, rows_T, index_N, weights_N, gradients_T)
        name = record.layer if record is not None else asked.layer
        with self._router.admission.admit(name, len(index_N)):
            if record is not None and any(record.slices.get(part[0], 1) > 1 for part in parts):
                outcomes, own, answered = await self._sliced(record, meta, one, timeout)
            else:
                own = parts
                outcomes, answered = await self._replicas.shares(record, meta, parts, one.share, timeout)
        told: dict[str, Any] = {"outcomes": [outcomes[at] for at in range(len(parts))]}
        if epoch is not None:
            told |= {"epoch": epoch.number, "versions": {part[0]: part[1] for part in parts}}
        if asked.op == "forward":
            outputs = {at: out for share, reply in answered for at, out in outputs_of(share, reply).items()}
            summed = weighted_sum(own, outputs, index_N, weights_N, len(rows_T)) if outputs else None
            return frame_of(told, {} if summed is None else {"outputs": summed})
        return frame_of(told, added(answered, rows_T, index_N))

    async def _sliced(
        self, record: SessionRecord, meta: dict[str, Any], one: _Pass, timeout: float
    ) -> tuple[dict[int, Outcome], list[Part], Answered]:
        """A pass in slices: the outcomes of its parts, and the slices of those that are whole, with their answers."""
        failed: dict[int, Outcome] = {}
        while True:
            left = [at for at in range(len(one.parts)) if at not in failed]
            counts = {part[0]: record.slices.get(part[0], 1) for part in one.parts}
            own, owners = slices_of([one.parts[at] for at in left], counts)
            fields = {**meta, "sliced": True}
            outcomes, answered = await self._replicas.shares(record, fields, own, one.of(own).share, timeout)
            told = {left[at]: outcome for at, outcome in folded(outcomes, owners).items()}
            lacking = {at: outcome for at, outcome in told.items() if "ok" not in outcome}
            failed |= lacking
            if not lacking or any("error" not in outcome for outcome in lacking.values()) or len(lacking) == len(left):
                break  # whoever is behind catches up, and the whole pass comes again
        if meta["op"] == "backward" and not lacking:
            told |= await self._count(record, meta, one, left, owners, answered, timeout)
        return failed | told, own, [] if lacking else answered

    async def _count(
        self,
        record: SessionRecord,
        meta: Mapping[str, Any],
        one: _Pass,
        left: Sequence[int],
        owners: Sequence[int],
        answered: Answered,
        timeout: float,
    ) -> dict[int, Outcome]:
        """Give the first replicas the sums of their slices' gradients, which makes them passes of their candidates.

        They are as large as the experts: they are added up beside the event loop, which serves meanwhile.
        """
        gradients = await asyncio.to_thread(gradients_of_slices, answered)
        fields = {key: meta[key] for key in ("step", "seed", "durable")} | {"op": "add"}

        async def count(at: int, position: int) -> Outcome:
            of_part = [gradients[slice] for slice, owner in enumerate(owners) if owner == at and slice in gradients]
            values, sizes = await asyncio.to_thread(slices.added, of_part)
            part, tensors = one.parts[position], {"values": values, "sizes": sizes}
            (outcome,), _ = await self._replicas.each(record, fields, [part], tensors, timeout)
            return outcome

        found = await asyncio.gather(*(count(at, position) for at, position in enumerate(left)))
        return dict(zip(left, found, strict=True))


class _Pass:
    """The parts of a pass, and its tensors."""

    def __init__(
        self,
        parts: Sequence[Part],
        rows_T: Tensor,
        index_N: Tensor,
        weights_N: Tensor | None,
        gradients_T: Tensor | None,
    ) -> None:
        self.parts = list(parts)
        self._tensors = rows_T, index_N, gradients_T, weights_N

    def of(self, parts: Sequence[Part]) -> _Pass:
        """The same pass with other parts."""
        rows_T, index_N, gradients_T, weights_N = self._tensors
        return _Pass(parts, rows_T, index_N, weights_N, gradients_T)

    def share(self, positions: Sequence[int]) -> Share:
        """The share of the parts at these positions."""
        return split(self.parts, positions, *self._tensors)
