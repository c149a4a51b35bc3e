"""The methods of a client, blocking and as coroutines: the flows of calls.py, whose steps the client performs."""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from ...experts.errors import ExpertMeshError, InvalidRequest
from ..rpc.documents import decode_document
from ..rpc.swaps import Lease
from .calls import Calls
from .retry import Answer, Flow, Step, drive, drive_async
from .training.options import TrainingOptions, holder
from .training.schedule import Schedule, schedule_of
from .training.session import TrainingSession

OPEN_SECONDS = 300.0
"""How long a session may take to be opened: the weights of all its experts are written."""

P = ParamSpec("P")
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def _blocking(flow: Callable[Concatenate[Calls, P], Flow[T]]) -> Callable[Concatenate[BlockingMethods, P], T]:
    """Turn a flow of `Calls` into a method that blocks."""

    @functools.wraps(flow)
    def method(client: BlockingMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return drive(flow(client._calls, *args, **kwargs), client._perform)

    return _described(method, flow)


def _awaiting(
    flow: Callable[Concatenate[Calls, P], Flow[T]],
) -> Callable[Concatenate[AwaitingMethods, P], Awaitable[T]]:
    """Turn a flow of `Calls` into a coroutine method."""

    @functools.wraps(flow)
    async def method(client: AwaitingMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await drive_async(flow(client._calls, *args, **kwargs), client._perform)

    return _described(method, flow)


def _described(method: Method, flow: Callable[..., Flow[Any]]) -> Method:
    """The method with the signature of its flow, and the flow's result as its return type."""
    signature = inspect.signature(flow)
    result = str(signature.return_annotation).removeprefix("Flow[").removesuffix("]")
    vars(method)["__signature__"] = signature.replace(return_annotation=result)
    method.__annotations__ = {**flow.__annotations__, "return": result}
    return method


class BlockingMethods:
    """Methods that block until there is an answer."""

    _calls: Calls

    def _perform(self, step: Step) -> Answer:
        """Perform one step of a flow."""
        raise NotImplementedError

    forward = _blocking(Calls.forward)
    call = _blocking(Calls.call)
    status = _blocking(Calls.status)
    drain = _blocking(Calls.drain)
    health = _blocking(Calls.health)
    swap = _blocking(Calls.swap)
    rollback = _blocking(Calls.rollback)
    history = _blocking(Calls.history)
    declared = _blocking(Calls.declared)
    scale = _blocking(Calls.scale)
    add_expert = _blocking(Calls.add_expert)
    remove_expert = _blocking(Calls.remove_expert)
    add_layer = _blocking(Calls.add_layer)
    remove_layer = _blocking(Calls.remove_layer)
    change_layers = _blocking(Calls.change_layers)
    swap_progress = _blocking(Calls.swap_progress)
    leases = _blocking(Calls.leases)
    end_lease = _blocking(Calls.end_lease)
    _training = _blocking(Calls.training)

    def train(
        self,
        layer: str,
        *,
        experts: Sequence[str] | None = None,
        optimizer: str | None = "torch.optim:AdamW",
        lr: float = 1e-3,
        schedule: str | Schedule | None = None,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        clip_norm: float | None = None,
        accumulate: int = 1,
        durable_every: int | None = 100,
        on_missing: str = "error",
        patience: float | None = None,
        replicas: str = "first",
        seed: int | None = None,
        resume: str | None = None,
        **arguments: Any,
    ) -> TrainingSession:
        """Open a session of training on copies of the experts of a layer, beside those that serve, which learn nothing.

        `experts` are the ids of those to train, by default all; each needs to be a torch module. `optimizer` is one of
        torch.optim, which lives beside each expert; `arguments` are its own, such as `weight_decay` or `betas`. None
        leaves the update to you. `lr` times `schedule` is the learning rate of a step: "constant", "linear" or "cosine"
        over `total_steps` after `warmup_steps`, or a function of the step. `clip_norm` bounds the norm of the gradients
        of all experts together, `accumulate` is the number of calls of `step` for each update.

        Every `durable_every` steps the session survives the loss of every process (None: when you `save`); what was
        learned since is repeated to an expert that is lost and comes back. `on_missing` "leave_out" lets training go on
        without an expert that has not answered for `patience` seconds, "error" raises its error. `replicas` says who
        computes: the "first" replica of each expert, or "all" that there are now, each a slice of the rows, whose
        gradients are added up before the update. `seed` makes dropout reproducible. `resume` is the id of a session to
        go on with at its durable step, with the optimizer and the replicas that it was opened with.

        An expert has one session: another one that wants it is refused, and told who has it. Needs the role operator.

        Raises NotFound, InvalidRequest, ConfigError for an optimizer that is unknown or refuses its arguments, and
        FailedPrecondition for an expert that is in another session, or the disk is full.
        """
        if optimizer is not None and not isinstance(optimizer, str):
            raise InvalidRequest('name the optimizer, as in optimizer="torch.optim:AdamW": it lives beside the expert')
        options = TrainingOptions(
            lr=lr,
            schedule=schedule_of(schedule, total_steps, warmup_steps),
            clip_norm=clip_norm,
            accumulate=accumulate,
            durable_every=durable_every,
            on_missing=on_missing,
            patience=patience,
            seed=seed,
        )
        if resume is not None:
            frame = self._training("Train", {"op": "resume", "session": resume, "layer": layer}, {}, OPEN_SECONDS)
            saved = bytes(frame.tensors["caller"].data) if "caller" in frame.tensors else None
            return TrainingSession(self, frame.meta, options, saved)
        meta: dict[str, Any] = {"op": "open", "layer": layer, "optimizer": optimizer, "arguments": arguments}
        meta |= {"holder": holder(), "replicas": replicas}
        meta["session"] = uuid.uuid4().hex  # drawn here: a retry opens the same one
        if experts is not None:
            meta["experts"] = list(experts)
        frame = self._training("Train", meta, {}, OPEN_SECONDS)
        return TrainingSession(self, frame.meta, options)

    def training_sessions(self) -> list[dict[str, Any]]:
        """All sessions of training: "id", "layer", "experts", "holder", "optimizer", "opened_at" and "durable" step."""
        return list(decode_document(self._training("Train", {"op": "sessions"}, {}), "train")["sessions"])

    def end_training(self, session_id: str) -> None:
        """End a session of training by its id, and forget what it has learned; that of another token needs an admin.

        Raises NotFound for one that there is not, and PermissionDenied.
        """
        self._training("Train", {"op": "close", "session": session_id}, {})

    @contextmanager
    def pin(self, ttl: float = 30.0) -> Iterator[Lease]:
        """Lease the current epoch for several calls: `with client.pin() as lease: client.call("news", x, pin=lease)`.

        The lease ends with the block, `ttl` seconds (at most 60) after its last use, or 10 seconds after a swap has
        replaced the epoch. Raises the errors of a call.
        """
        lease = drive(self._calls.lease(ttl), self._perform)
        try:
            yield lease
        finally:
            with suppress(ExpertMeshError):  # it expires anyway
                drive(self._calls.give_back(lease), self._perform)


class AwaitingMethods:
    """The same methods as coroutines."""

    _calls: Calls

    async def _perform(self, step: Step) -> Answer:
        """Perform one step of a flow."""
        raise NotImplementedError

    forward = _awaiting(Calls.forward)
    call = _awaiting(Calls.call)
    status = _awaiting(Calls.status)
    drain = _awaiting(Calls.drain)
    health = _awaiting(Calls.health)
    swap = _awaiting(Calls.swap)
    rollback = _awaiting(Calls.rollback)
    history = _awaiting(Calls.history)
    declared = _awaiting(Calls.declared)
    scale = _awaiting(Calls.scale)
    add_expert = _awaiting(Calls.add_expert)
    remove_expert = _awaiting(Calls.remove_expert)
    add_layer = _awaiting(Calls.add_layer)
    remove_layer = _awaiting(Calls.remove_layer)
    change_layers = _awaiting(Calls.change_layers)
    swap_progress = _awaiting(Calls.swap_progress)
    leases = _awaiting(Calls.leases)
    end_lease = _awaiting(Calls.end_lease)

    @asynccontextmanager
    async def pin(self, ttl: float = 30.0) -> AsyncIterator[Lease]:
        """Lease the current epoch for several calls, as `Client.pin` does: `async with client.pin() as lease: ...`."""
        lease = await drive_async(self._calls.lease(ttl), self._perform)
        try:
            yield lease
        finally:
            with suppress(ExpertMeshError):  # it expires anyway
                await drive_async(self._calls.give_back(lease), self._perform)
