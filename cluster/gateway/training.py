"""The server side of training: checks what is asked, finds the replicas, and keeps the sessions. No gRPC here.

A candidate that is not where its session takes it to be is told to the client, which repeats what is missing. One that
is not there at all, because its process was replaced, is opened again first, at the session's durable step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ...experts.errors import (
    DataLoss,
    ExpertMeshError,
    Fenced,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RouterUnavailable,
    VersionGone,
)
from ...experts.protocol import TrainReply, from_mapping
from ...experts.tensors import from_wire
from ...experts.training.desk import as_tensor
from ...experts.wire import Frame
from ...router.fanout.replica_view import READY, Replica
from ...router.request.forward import Router
from ...router.training.exchange import Exchange, Part
from ...router.training.passes import Share, all_failed, outputs_of, split, weighted_sum
from ..rpc.documents import NAME, to_tensor
from ..rpc.methods import Role
from ..rpc.training import OPEN_TO_READERS, TrainAsked
from ..state.training_sessions import SessionRecord, TrainingSessions
from .authorise import Caller
from .training_requests import Outcome, added, check_pass, frame_of, layer_frame, needed, parts_of, raise_first

MOST_HOLDER = 200
ATTACHED = "attached "
ANY_GENERATION = ("open", "resume", "close")
"""The operations that need not know who has taken up the session last."""

BYTES = ("weights", "gradients")
"""The operations that answer with the content of a safetensors file, for one part."""


class TrainMethods:
    """Answers requests of training, on the router's event loop."""

    def __init__(
        self,
        router: Router,
        sessions: TrainingSessions | None,
        is_token: Callable[[str], bool] = lambda id: True,
        *,
        attached: bool = False,
    ) -> None:
        """`is_token` tells whether the token with an id is one of the cluster's; `attached` whether this router is."""
        self._router = router
        self._attached = attached
        self._is_token = is_token
        self._sessions = sessions
        self._exchange = Exchange(router.transport, router.view)

    async def answer(self, frame: Frame, caller: Caller, of_session: bool, timeout: float) -> Frame:
        """Answer one request, of a session or not, within `timeout` seconds. Raises an ExpertMeshError."""
        if frame.kind != "train":
            raise InvalidRequest("expected a frame of kind train")
        asked: TrainAsked = from_mapping(TrainAsked, frame.meta)
        tensors = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
        if not of_session and (asked.session or asked.op not in OPEN_TO_READERS):
            raise InvalidRequest("sessions are trained by the method Train")
        self._router.standing.check()
        return await self._carry_out(asked, tensors, caller, timeout)

    async def _carry_out(
        self, asked: TrainAsked, tensors: Mapping[str, Tensor], caller: Caller, timeout: float
    ) -> Frame:
        if asked.op == "versions":
            return layer_frame(self._router.layer(asked.layer), self._router.epochs.current)
        if asked.op == "sessions":
            return await self._list()
        if asked.op == "open":
            return await self._open(asked, caller, timeout)
        if asked.op == "close":
            return await self._close(asked, caller, timeout)
        record = self._record(asked, caller) if asked.session else None
        if asked.op in ("forward", "backward"):
            return await self._pass(asked, tensors, record, timeout)
        if record is None:
            raise InvalidRequest(f"{asked.op[:64]} needs a session")
        return await self._of_session(asked, tensors, record, timeout)

    async def _of_session(
        self, asked: TrainAsked, tensors: Mapping[str, Tensor], record: SessionRecord, timeout: float
    ) -> Frame:
        store = self._store()
        if asked.op == "resume":  # whatever its candidates had applied since is not known to whoever resumes it
            if asked.layer not in ("", record.layer):
                raise InvalidRequest(f"this session trains layer {record.layer}, not {asked.layer[:64]}")
            record = await asyncio.to_thread(store.take_up, record.id)
            raise_first(await self._open_all(record, timeout))
            content = await asyncio.to_thread(store.caller, record)
            return frame_of(asdict(record), {} if content is None else {"caller": as_tensor(content)})
        if asked.op == "save":
            return await self._save(asked, tensors, record, timeout)
        if asked.op == "rebase":
            await asyncio.to_thread(store.rebase, record.id, asked.versions, asked.publishing)
            return frame_of({})
        parts = parts_of(asked, record, None)
        if asked.op in BYTES and len(parts) != 1:
            raise InvalidRequest(f"{asked.op} are of one expert at a time")
        own = {"data": tensors["data"]} if asked.op in ("check", "load") and "data" in tensors else {}
        meta = {
            "op": asked.op, "session": record.id, "step": asked.step, "lr": asked.lr, "scale": asked.scale,
            "durable": asked.durable,
        }  # fmt: skip
        outcomes, found = await self._each(record, meta, parts, own, timeout)
        return frame_of({"outcomes": outcomes}, found)

    async def _list(self) -> Frame:
        records = await asyncio.to_thread(self._store().all)
        fields = ("id", "layer", "holder", "opened_at", "durable", "optimizer")
        told = [{name: getattr(record, name) for name in fields} for record in records]
        for record, entry in zip(records, told, strict=True):
            entry["experts"] = sorted(record.experts)
        return Frame("train", {}, {NAME: to_tensor({"sessions": told})})

    async def _open(self, asked: TrainAsked, caller: Caller, timeout: float) -> Frame:
        layer, epoch = self._router.layer(asked.layer), self._router.epochs.current
        chosen = asked.experts or list(layer.everyone_by_id)
        if unknown := sorted(set(chosen) - layer.everyone_by_id.keys()):
            raise InvalidRequest(f"{unknown[0]!r} is no expert of layer {layer.name}")
        record = SessionRecord(
            id=asked.session,
            layer=layer.name,
            experts={id: epoch.versions[id] for id in dict.fromkeys(chosen)},
            holder="".join(filter(str.isprintable, asked.holder))[:MOST_HOLDER] or "another client",
            owner=self._owner_of(caller),
            opened_at=time.time(),
            optimizer=asked.optimizer,
            arguments=asked.arguments,
        )
        store = self._store()
        await asyncio.to_thread(store.add, record)
        record = self._record(asked, caller)
        try:
            if not record.folder:
                raise_first(await self._open_all(record, timeout, fresh=True))
                saved = await self._save(replace(asked, step=0), {}, record, timeout)
                raise_first(saved.meta["outcomes"])
        except BaseException:
            await asyncio.to_thread(store.remove, record.id)
            await self._drop(record, timeout)
            raise
        return frame_of(asdict(store.get(record.id)))

    async def _open_all(self, record: SessionRecord, timeout: float, *, fresh: bool = False) -> list[Outcome]:
        parts = [(id, version, 0, 0, 0) for id, version in record.experts.items()]
        return list(await asyncio.gather(*(self._opened(record, part, timeout, fresh=fresh) for part in parts)))

    async def _close(self, asked: TrainAsked, caller: Caller, timeout: float) -> Frame:
        """End a session; an admin ends one whose record is damaged, too."""
        store, record = self._store(), None
        try:
            record = self._record(asked, caller)
        except DataLoss:
            if caller.role < Role.ADMIN:
                raise
        await asyncio.to_thread(store.remove, asked.session)
        if record is not None:
            await self._drop(record, timeout)
        return frame_of({})

    async def _save(
        self, asked: TrainAsked, tensors: Mapping[str, Tensor], record: SessionRecord, timeout: float
    ) -> Frame:
        """Save a step of all experts; none is saved where one is not there yet."""
        meta = {"op": "state", "session": record.id, "step": asked.step + 1, "durable": asked.durable}
        parts = [(id, version, 0, 0, 0) for id, version in record.experts.items()]
        answers = await asyncio.gather(*(self._each(record, meta, [part], {}, timeout) for part in parts))
        states: dict[str, bytes] = {}
        for part, (outcomes, found) in zip(parts, answers, strict=True):
            if "ok" not in outcomes[0]:
                return frame_of({"outcomes": outcomes, "expert": part[0], "durable": record.durable})
            states[part[0]] = bytes(found["data"].numpy())
        caller = bytes(tensors["caller"].numpy()) if "caller" in tensors else None
        durable = await asyncio.to_thread(self._store().save, record.id, asked.step, states, caller)
        return frame_of({"outcomes": [{"ok": True}], "expert": "", "durable": durable})

    async def _pass(
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
        if record is not None:
            meta["session"] = record.id

        def share_of(positions: Sequence[int]) -> Share:
            return split(parts, positions, rows_T, index_N, gradients_T, weights_N)

        name = record.layer if record is not None else asked.layer
        with self._router.admission.admit(name, len(index_N)):
            outcomes, answered = await self._shared(record, meta, parts, share_of, timeout)
        told: dict[str, Any] = {"outcomes": [outcomes[at] for at in range(len(parts))]}
        if epoch is not None:
            told |= {"epoch": epoch.number, "versions": {part[0]: part[1] for part in parts}}
        if asked.op == "forward":
            outputs = {at: out for share, reply in answered for at, out in outputs_of(share, reply).items()}
            summed = weighted_sum(parts, outputs, index_N, weights_N, len(rows_T)) if outputs else None
            return frame_of(told, {} if summed is None else {"outputs": summed})
        return frame_of(told, added(answered, rows_T, index_N))

    async def _shared(
        self,
        record: SessionRecord | None,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        share_of: Callable[[Sequence[int]], Share],
        timeout: float,
    ) -> tuple[dict[int, Outcome], list[tuple[Share, TrainReply]]]:
        """Have each replica compute its share; the outcomes by position, and the answers in the order of the parts."""
        outcomes, replicas = self._located(record, parts)

        async def one(replica: Replica, positions: Sequence[int]) -> tuple[Share, TrainReply]:
            share = share_of(positions)

            def send() -> Awaitable[TrainReply]:
                return self._exchange.ask(replica, meta, share.parts, share.tensors, timeout)

            return share, await self._replied(record, replica, [parts[at] for at in positions], send, timeout)

        answered = list(await asyncio.gather(*(one(*found) for found in replicas)))
        for share, reply in answered:
            outcomes.update(zip(share.positions, map(dict, reply.outcomes), strict=True))
        return outcomes, answered

    async def _each(
        self,
        record: SessionRecord,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        tensors: Mapping[str, Tensor],
        timeout: float,
    ) -> tuple[list[Outcome], dict[str, Tensor]]:
        """Have the replicas carry out an operation without rows, on each part."""
        outcomes, replicas = self._located(record, parts)
        found: dict[str, Tensor] = {}

        async def one(replica: Replica, positions: Sequence[int]) -> None:
            own = [parts[at] for at in positions]

            def send() -> Awaitable[TrainReply]:
                return self._exchange.ask(replica, meta, own, tensors, timeout)

            reply = await self._replied(record, replica, own, send, timeout)
            outcomes.update(zip(positions, map(dict, reply.outcomes), strict=True))
            found.update(reply.tensors)

        await asyncio.gather(*(one(*located) for located in replicas))
        return [outcomes[at] for at in range(len(parts))], found

    def _located(
        self, record: SessionRecord | None, parts: Sequence[Part]
    ) -> tuple[dict[int, Outcome], list[tuple[Replica, list[int]]]]:
        """The replica of each part, and the outcomes of those that have none now."""
        outcomes: dict[int, Outcome] = {}
        served = {id for layer in self._router.epochs.current.layers.values() for id in layer.everyone_by_id}
        by_replica: dict[str, tuple[Replica, list[int]]] = {}
        for at, (expert, version, *_) in enumerate(parts):
            try:
                if record is not None and expert not in served:
                    raise NotFound(f"{expert} is in no layer any more: end the session, or add the expert again")
                view = self._router.view
                replica = view.choose([(expert, version)]) if record is None else view.first(expert)
            except ExpertMeshError as error:
                outcomes[at] = {"error": type(error).__name__, "message": error.message}
                continue
            by_replica.setdefault(replica.id, (replica, []))[1].append(at)
        return outcomes, list(by_replica.values())

    async def _replied(
        self,
        record: SessionRecord | None,
        replica: Replica,
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
            opened = await asyncio.gather(*(self._opened(record, part, timeout, replica=replica) for part in absent))
            if all("ok" in outcome for outcome in opened):
                reply = await send()
            by_expert = dict(zip((part[0] for part in absent), opened, strict=True))
            told = [
                _lost(part, by_expert) if "absent" in outcome else dict(outcome)
                for part, outcome in zip(parts, reply.outcomes, strict=True)
            ]
            return replace(reply, outcomes=tuple(told))
        except ExpertMeshError as error:
            return TrainReply("", all_failed(len(parts), type(error).__name__, error.message))

    async def _opened(
        self,
        record: SessionRecord,
        part: Part,
        timeout: float,
        *,
        fresh: bool = False,
        replica: Replica | None = None,
    ) -> Outcome:
        """Open a candidate at a replica, by default the first: at the durable step, or `fresh` from what serves."""
        meta = {
            "op": "open", "session": record.id, "optimizer": record.optimizer, "arguments": record.arguments,
        }  # fmt: skip
        try:
            state = None if fresh else await asyncio.to_thread(self._store().state, record, part[0])
            tensors = {} if state is None else {"data": as_tensor(state)}
            where = self._router.view.first(part[0]) if replica is None else replica
            own = (part[0], record.experts[part[0]], 0, 0, 0)
            reply = await self._exchange.ask(where, meta, [own], tensors, timeout)
        except ExpertMeshError as error:
            return {"error": type(error).__name__, "message": error.message}
        return dict(reply.outcomes[0])

    async def _drop(self, record: SessionRecord, timeout: float) -> None:
        """Drop the candidates of a session wherever they may be; those out of reach go with the next session."""
        for replica in self._router.view.replicas():
            own = [(id, "", 0, 0, 0) for id in record.experts if id in replica.experts]
            if own and replica.state == READY:
                with suppress(ExpertMeshError):
                    await self._exchange.ask(replica, {"op": "close", "session": record.id}, own, {}, timeout)

    def _record(self, asked: TrainAsked, caller: Caller) -> SessionRecord:
        """The record of the session that a caller asks for. Raises NotFound, PermissionDenied or Fenced."""
        record = self._store().get(asked.session)
        own = record.owner == self._owner_of(caller)
        forgotten = not record.owner.startswith(ATTACHED) and not self._is_token(record.owner)  # by another start
        if not own and not forgotten and caller.role < Role.ADMIN:
            raise PermissionDenied(
                f"the session belongs to {record.holder}: only its own token, or an admin's, may use it"
            )
        if asked.generation != record.generation and asked.op not in ANY_GENERATION:
            raise Fenced("another process has resumed this session since: resume it again to go on here")
        return record

    def _owner_of(self, caller: Caller) -> str:
        """Whom a session belongs to: a token, or an attached process, whose own token no other router knows."""
        return f"{ATTACHED}{caller.id}" if self._attached else caller.id

    def _store(self) -> TrainingSessions:
        if self._sessions is None:
            raise RouterUnavailable("this router is not where the cluster's state is: ask another one")
        return self._sessions


def _lost(part: Part, opened: Mapping[str, Outcome]) -> Outcome:
    outcome = opened[part[0]]
    lost = {"error": "Unavailable", "message": f"{part[0]}: its replica was replaced meanwhile; retry"}
    return outcome if "error" in outcome else lost
