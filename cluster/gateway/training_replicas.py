"""Messages of training to the replicas of experts, which are given the candidates that they lack. No gRPC here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...experts.errors import ExpertMeshError, NotFound
from ...experts.protocol import TrainReply
from ...experts.training.desk import as_tensor
from ...router.fanout.replica_view import READY, Replica
from ...router.request.forward import Router
from ...router.training.exchange import Exchange, Part
from ...router.training.passes import Share, all_failed
from ..state.training_sessions import SessionRecord, TrainingSessions
from .training_requests import Outcome

Located = tuple[Replica, bool, list[int]]
"""A replica, whether it computes with copies of candidates that are elsewhere, and the positions of its parts."""


class TrainingReplicas:
    """Asks the replicas that hold the candidates of sessions, or copies of them. Belongs to the router's event loop."""

    def __init__(self, router: Router, sessions: TrainingSessions | None) -> None:
        self._router = router
        self._sessions = sessions
        self._exchange = Exchange(router.transport, router.view)

    async def shares(
        self,
        record: SessionRecord | None,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        share_of: Callable[[Sequence[int]], Share],
        timeout: float,
    ) -> tuple[dict[int, Outcome], list[tuple[Share, TrainReply]]]:
        """Have each replica compute its share; the outcomes by position, and the answers in the order of the parts.

        With `sliced` in `meta` the parts are slices, which the ready replicas of an expert take in turns.
        """
        outcomes, located = self._located(record, parts, sliced="sliced" in meta)
        meta = _of(record, meta)

        async def one(replica: Replica, copied: bool, positions: Sequence[int]) -> tuple[Share, TrainReply]:
            share, fields = share_of(positions), {**meta, "copied": True} if copied else meta

            def send() -> Awaitable[TrainReply]:
                return self._exchange.ask(replica, fields, share.parts, share.tensors, timeout)

            own = [parts[at] for at in positions]
            return share, await self._replied(record, replica, fields, own, send, timeout)

        answered = list(await asyncio.gather(*(one(*found) for found in located)))
        for share, reply in answered:
            outcomes.update(zip(share.positions, map(dict, reply.outcomes), strict=True))
        return outcomes, answered

    async def each(
        self,
        record: SessionRecord,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        tensors: Mapping[str, Tensor],
        timeout: float,
    ) -> tuple[list[Outcome], dict[str, Tensor]]:
        """Have the first replicas carry out an operation without rows, on each part."""
        outcomes, located = self._located(record, parts)
        meta = _of(record, meta)
        found: dict[str, Tensor] = {}

        async def one(replica: Replica, _: bool, positions: Sequence[int]) -> None:
            own = [parts[at] for at in positions]

            def send() -> Awaitable[TrainReply]:
                return self._exchange.ask(replica, meta, own, tensors, timeout)

            reply = await self._replied(record, replica, meta, own, send, timeout)
            outcomes.update(zip(positions, map(dict, reply.outcomes), strict=True))
            found.update(reply.tensors)

        await asyncio.gather(*(one(*found) for found in located))
        return [outcomes[at] for at in range(len(parts))], found

    def _located(
        self, record: SessionRecord | None, parts: Sequence[Part], *, sliced: bool = False
    ) -> tuple[dict[int, Outcome], list[Located]]:
        """The replica of each part, and the outcomes of those that have none now."""
        outcomes: dict[int, Outcome] = {}
        served = {id for layer in self._router.epochs.current.layers.values() for id in layer.everyone_by_id}
        by_replica: dict[tuple[str, bool], Located] = {}
        view = self._router.view
        for at, (expert, version, _, _, number) in enumerate(parts):
            try:
                if record is not None and expert not in served:
                    raise NotFound(f"{expert} is in no layer any more: end the session, or add the expert again")
                if record is None:
                    replica, copied = view.choose([(expert, version)]), False
                else:
                    ready = view.ready(expert)
                    turn = number % len(ready) if sliced else 0
                    replica, copied = ready[turn], turn > 0
            except ExpertMeshError as error:
                outcomes[at] = {"error": type(error).__name__, "message": error.message}
                continue
            by_replica.setdefault((replica.id, copied), (replica, copied, []))[2].append(at)
        return outcomes, list(by_replica.values())

    async def _replied(
        self,
        record: SessionRecord | None,
        replica: Replica,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        send: Callable[[], Awaitable[TrainReply]],
        timeout: float,
    ) -> TrainReply:
        """What a replica answers, after candidates that it lacks were opened there; a lost message fails its parts."""
        try:
            reply = await send()
            absent = [part for part, outcome in zip(parts, reply.outcomes, strict=True) if "absent" in outcome]
            if not absent or record is None:
                return reply
            first = {part[0]: part for part in absent}
            if "copied" in meta:
                opening = [self._copied(record, part, meta["step"], replica, timeout) for part in first.values()]
            else:
                opening = [self.opened(record, part, timeout, replica=replica) for part in first.values()]
            opened = dict(zip(first, await asyncio.gather(*opening), strict=True))
            if all("ok" in outcome for outcome in opened.values()):
                reply = await send()
            told = [
                _lost(part, opened) if "absent" in outcome else dict(outcome)
                for part, outcome in zip(parts, reply.outcomes, strict=True)
            ]
            return replace(reply, outcomes=tuple(told))
        except ExpertMeshError as error:
            return TrainReply("", all_failed(len(parts), type(error).__name__, error.message))

    async def opened(
        self,
        record: SessionRecord,
        part: Part,
        timeout: float,
        *,
        fresh: bool = False,
        replica: Replica | None = None,
    ) -> Outcome:
        """Open a candidate at a replica, by default the first: at the durable step, or `fresh` from what serves."""
        meta = _of(record, {"op": "open", "optimizer": record.optimizer, "arguments": record.arguments})
        try:
            state = None
            if not fresh and self._sessions is not None:
                state = await asyncio.to_thread(self._sessions.state, record, part[0])
            tensors = {} if state is None else {"data": as_tensor(state)}
            where = self._router.view.first(part[0]) if replica is None else replica
            own = (part[0], record.experts[part[0]], 0, 0, 0)
            reply = await self._exchange.ask(where, meta, [own], tensors, timeout)
        except ExpertMeshError as error:
            return {"error": type(error).__name__, "message": error.message}
        return dict(reply.outcomes[0])

    async def _copied(self, record: SessionRecord, part: Part, step: int, replica: Replica, timeout: float) -> Outcome:
        """Give a replica a copy of the candidate that is at the first one, as it is before a step."""
        own = (part[0], record.experts[part[0]], 0, 0, 0)
        asked = {"op": "weights", "step": step, "durable": record.durable}
        outcomes, found = await self.each(record, asked, [own], {}, timeout)
        if "ok" not in outcomes[0]:
            return outcomes[0]
        try:
            meta = _of(record, {"op": "copy", "step": step})
            reply = await self._exchange.ask(replica, meta, [own], {"data": found["data"]}, timeout)
        except ExpertMeshError as error:
            return {"error": type(error).__name__, "message": error.message}
        return dict(reply.outcomes[0])

    async def drop(self, record: SessionRecord, timeout: float) -> None:
        """Drop the candidates of a session wherever they may be; those out of reach go with the next session."""
        for replica in self._router.view.replicas():
            own = [(id, "", 0, 0, 0) for id in record.experts if id in replica.experts]
            if own and replica.state == READY:
                with suppress(ExpertMeshError):
                    await self._exchange.ask(replica, {"op": "close", "session": record.id}, own, {}, timeout)


def _of(record: SessionRecord | None, meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a message for a session: candidates of another generation are not what they were."""
    return meta if record is None else {**meta, "session": record.id, "generation": record.generation}


def _lost(part: Part, opened: Mapping[str, Outcome]) -> Outcome:
    outcome = opened.get(part[0], {"ok": True})  # one that was there at first is not among those that were opened
    lost = {"error": "Unavailable", "message": f"{part[0]}: its replica was replaced meanwhile; retry"}
    return lost if "ok" in outcome else outcome
