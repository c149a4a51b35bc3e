"""The server side of training: checks what is asked, finds the replicas, and keeps the sessions. No gRPC here.

A candidate that is not where its session takes it to be is told to the client, which repeats what is missing. One that
is not there at all, because its process was replaced, is opened again first, at the session's durable step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from torch import Tensor

from ...experts.errors import (
    DataLoss,
    Fenced,
    InvalidRequest,
    PermissionDenied,
    RouterUnavailable,
)
from ...experts.protocol import from_mapping
from ...experts.tensors import from_wire
from ...experts.training.desk import as_tensor
from ...experts.wire import Frame
from ...router.request.forward import Router
from ..rpc.documents import NAME, to_tensor
from ..rpc.methods import Role
from ..rpc.training import OPEN_TO_READERS, REPLICAS, TrainAsked
from ..state.training_sessions import SessionRecord, TrainingSessions
from .authorise import Caller
from .training_passes import TrainingPasses
from .training_replicas import TrainingReplicas
from .training_requests import Outcome, frame_of, layer_frame, parts_of, raise_first

MOST_HOLDER = 200
MARGIN, MOST_MARGIN = 0.1, 1.0
"""The share of a caller's time, and the most seconds, that replicas do not get: so that it hears which one is late."""

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
        self._replicas = TrainingReplicas(router, sessions)
        self._passes = TrainingPasses(router, self._replicas)

    async def answer(self, frame: Frame, caller: Caller, of_session: bool, timeout: float) -> Frame:
        """Answer one request, of a session or not, within `timeout` seconds. Raises an ExpertMeshError."""
        if frame.kind != "train":
            raise InvalidRequest("expected a frame of kind train")
        asked: TrainAsked = from_mapping(TrainAsked, frame.meta)
        tensors = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
        if not of_session and (asked.session or asked.op not in OPEN_TO_READERS):
            raise InvalidRequest("sessions are trained by the method Train")
        self._router.standing.check()
        return await self._carry_out(asked, tensors, caller, timeout - min(MOST_MARGIN, MARGIN * timeout))

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
            return await self._passes.answer(asked, tensors, record, timeout)
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
        fields = ("op", "step", "lr", "scale", "durable")
        meta = {name: getattr(asked, name) for name in fields}
        outcomes, found = await self._replicas.each(record, meta, parts, own, timeout)
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
        if asked.replicas not in REPLICAS:
            raise InvalidRequest(f"replicas must be one of {', '.join(REPLICAS)}, not {asked.replicas[:64]!r}")
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
            slices={id: len(self._router.view.ready(id)) for id in chosen} if asked.replicas == "all" else {},
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
            await self._replicas.drop(record, timeout)
            raise
        return frame_of(asdict(store.get(record.id)))

    async def _open_all(self, record: SessionRecord, timeout: float, *, fresh: bool = False) -> list[Outcome]:
        parts = [(id, version, 0, 0, 0) for id, version in record.experts.items()]
        opening = (self._replicas.opened(record, part, timeout, fresh=fresh) for part in parts)
        return list(await asyncio.gather(*opening))

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
            await self._replicas.drop(record, timeout)
        return frame_of({})

    async def _save(
        self, asked: TrainAsked, tensors: Mapping[str, Tensor], record: SessionRecord, timeout: float
    ) -> Frame:
        """Save a step of all experts; none is saved where one is not there yet."""
        meta = {"op": "state", "step": asked.step + 1, "durable": asked.durable}
        parts = [(id, version, 0, 0, 0) for id, version in record.experts.items()]
        answers = await asyncio.gather(*(self._replicas.each(record, meta, [part], {}, timeout) for part in parts))
        states: dict[str, bytes] = {}
        for part, (outcomes, found) in zip(parts, answers, strict=True):
            if "ok" not in outcomes[0]:
                return frame_of({"outcomes": outcomes, "expert": part[0], "durable": record.durable})
            states[part[0]] = bytes(found["data"].numpy())
        caller = bytes(tensors["caller"].numpy()) if "caller" in tensors else None
        durable = await asyncio.to_thread(self._store().save, record.id, asked.step, states, caller)
        return frame_of({"outcomes": [{"ok": True}], "expert": "", "durable": durable})

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
