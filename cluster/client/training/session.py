"""A session of training: candidates of experts that learn beside what serves, until they are published."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from ....experts.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound, Unavailable
from ....experts.wire import WireTensor
from ...rpc.swaps import SwapOutcome
from ...rpc.training import error_of
from .delivery import Connection, Delivery
from .options import Passed, StepResult, TrainingOptions, checked_rate
from .publishing import Publications, check_probe
from .updates import Part

SEEDS = 1 << 62
CLIP_EPSILON = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


class TrainingSession:
    """A session of training, made by `Client.train`. Use it in one thread at a time.

    Leaving its block ends it; an exception, Ctrl-C too, leaves it to be resumed by its `id`.

    Example:
        with client.train("news", optimizer="torch.optim:AdamW", lr=1e-3) as session:
            moe = RemoteMoE(client, "news", gate=gate, session=session)
            for x, y in data:
                loss = F.cross_entropy(moe(x), y)
                loss.backward()
                session.step()
            session.publish()
    """

    def __init__(
        self, connection: Connection, record: Mapping[str, Any], options: TrainingOptions, saved: bytes | None = None
    ) -> None:
        """For `Client.train` alone. `saved` is what its caller saved with the durable step."""
        self.id: str = record["id"]
        self.layer: str = record["layer"]
        self.experts: tuple[str, ...] = tuple(record["experts"])
        self.optimizer: str | None = record["optimizer"]
        self.saved = saved
        self.closed = False
        self._connection = connection
        self._options = options
        self._delivery = Delivery(connection, self.id, int(record["generation"]), options, int(record["durable"]))
        self._publications = Publications(connection, self._delivery, record["experts"], record["publishing"])
        self._passes = dict.fromkeys(self.experts, 0)
        self._squares = dict.fromkeys(self.experts, 0.0)
        self._accumulated = 0
        self._pending: dict[str, Any] | None = None
        self._loading: dict[str, bytes] | None = None
        self._lock = threading.RLock()
        self._drawn = (0, 0)

    def __repr__(self) -> str:
        return f"TrainingSession({self.id!r}, layer={self.layer!r}, step={self.step_count}, durable={self.durable})"

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is None and not self.closed:
            self.abort()

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions that the experts were copied from, or published as last, by id."""
        return self._publications.versions

    @property
    def step_count(self) -> int:
        """The number of steps that are applied."""
        return self._delivery.applied

    @property
    def durable(self) -> int:
        """The number of steps that survive the loss of every process."""
        return self._delivery.durable

    @property
    def restored(self) -> Sequence[Mapping[str, Any]]:
        """What was lost and made up for: "expert", "lost_steps", and "at_step", the step that noticed it."""
        return tuple(self._delivery.restored)

    @property
    def left_out(self) -> int:
        """How many calls of experts were given up, because they did not answer."""
        return self._delivery.left_out

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._options.lr * self._options.schedule(self.step_count)

    def new_seed(self) -> int | None:
        """A seed for a forward pass and its backward pass, the same after a resume; None without one of the session."""
        if self._options.seed is None:
            return None
        if self._drawn[0] != self.step_count:
            self._drawn = (self.step_count, 0)
        self._drawn = (self.step_count, self._drawn[1] + 1)
        return random.Random(f"{self._options.seed} {self._drawn}").randrange(SEEDS)

    def forward(
        self,
        parts: Sequence[Part],
        tensors: dict[str, WireTensor],
        seed: int,
        *,
        training: bool = True,
        keep: bool = False,
        of_rows: bool = True,
    ) -> Passed:
        """A forward pass of the candidates, in training mode or not, for `RemoteMoE`. Raises an expert's error.

        `keep` says that a backward pass will follow, which needs the gradients of the rows if `of_rows`.
        """
        with self._lock:
            self._check_open()
            self._check_settled("another pass")
            meta = {
                "op": "forward", "seed": seed, "step": self.step_count + 1, "training": training, "keep": keep,
                "of_rows": of_rows,
            }  # fmt: skip
            frame, errors = self._delivery.ask(meta, parts, tensors)
            return Passed(frame.tensors, errors)

    def backward(
        self,
        parts: Sequence[Part],
        tensors: dict[str, WireTensor],
        seed: int,
        step: int,
        *,
        training: bool = True,
        of_rows: bool = True,
    ) -> Passed:
        """The backward pass of a forward pass of `step`, for `RemoteMoE`: the candidates keep their gradients."""
        with self._lock:
            self._check_open()
            if step != self.step_count + 1:
                raise FailedPrecondition(
                    f"step {step} of this backward pass is over: call forward again after each step"
                )
            self._check_settled("another pass")
            meta = {"op": "backward", "seed": seed, "step": step, "training": training, "of_rows": of_rows}
            numbered = [(id, version, a, b, self._passes[id]) for id, version, a, b, _ in parts]
            frame, errors = self._delivery.ask(meta, numbered, tensors)
            done = [part for part in numbered if part[0] not in errors]
            if done:
                self._delivery.updates.add(step, (meta, tensors), done, closes=False)
            for part, outcome in zip(numbered, frame.meta["outcomes"], strict=True):
                if part[0] not in errors:
                    self._passes[part[0]] += 1
                    self._squares[part[0]] = float(outcome["square"])
            return Passed(frame.tensors, errors)

    def step(self, lr: float | None = None) -> StepResult:
        """Update the experts with the gradients of all backward passes since the last step, as an optimizer's `step`.

        `lr` takes the place of the session's learning rate for this step. With `accumulate` it does so at every so many
        calls, with the mean of their gradients. Calling it again after an error does not repeat what is applied.

        Raises FailedPrecondition without a backward pass, for gradients that are not finite (then nothing is changed,
        and the gradients are dropped), and without an optimizer; and the error of an expert that does not answer in
        time, unless it may be left out.
        """
        with self._lock:
            self._check_open()
            if self.optimizer is None:
                raise FailedPrecondition("this session has no optimizer: load() what yours makes of its gradients()")
            if self._pending is None:
                if not any(self._passes.values()):
                    raise FailedPrecondition("there is nothing to update with: call forward and loss.backward() first")
                self._accumulated += 1
                if self._accumulated < self._options.accumulate:
                    return self._result(applied=False, norm=0.0)
                self._pending = self._prepared(checked_rate(self.lr if lr is None else lr))
            return self._apply(self._pending)

    def _prepared(self, lr: float) -> dict[str, Any]:
        """The update of the next step: the learning rate, and the factor of its gradients, from the norm of all."""
        squares = {id: self._squares[id] for id, passes in self._passes.items() if passes}
        guilty = [id for id, square in squares.items() if not math.isfinite(square)]
        if guilty:
            self.zero_grad()
            raise FailedPrecondition(
                f"the gradients of {', '.join(guilty)} are not finite (NaN or infinity), perhaps because the loss is "
                "not: nothing was changed, and the gradients are dropped"
            )
        total = math.sqrt(sum(squares.values()))
        norm = total / self._options.accumulate
        scale, clip = 1.0 / self._options.accumulate, self._options.clip_norm
        if clip is not None:
            scale *= min(1.0, clip / (norm + CLIP_EPSILON))
        return {"step": self.step_count + 1, "lr": float(lr), "scale": scale, "norm": norm}

    def _apply(self, pending: Mapping[str, Any]) -> StepResult:
        step = pending["step"]
        meta = {"op": "update", "step": step, "lr": pending["lr"], "scale": pending["scale"]}
        chains = {id: self._delivery.updates.chain(id, step) for id in self.experts}
        parts = [(id, "", chains[id], 0, passes) for id, passes in self._passes.items()]
        _, errors = self._delivery.ask(meta, parts, {})
        updated = tuple(id for id, passes in self._passes.items() if passes and id not in errors)
        self._delivery.updates.add(step, (meta, {}), parts, closes=True)
        self._passes = dict.fromkeys(self.experts, 0)
        self._delivery.applied, self._pending, self._accumulated = step, None, 0
        if not errors:
            self._save_if_due()
        elif self._delivery.updates.nbytes > self._options.replay_bytes:
            id, error = next(iter(errors.items()))
            raise Unavailable(
                f"{id} has been left out since about step {self.durable}, and more updates cannot be kept for it: "
                f"{error.message}"
            )
        left_out = {id: error.message for id, error in errors.items()}
        return self._result(applied=True, norm=pending["norm"], lr=pending["lr"], updated=updated, left_out=left_out)

    def _result(self, *, applied: bool, norm: float, lr: float | None = None, **more: Any) -> StepResult:
        rate = self.lr if lr is None else lr
        return StepResult(step=self.step_count, durable=self.durable, applied=applied, lr=rate, norm=norm, **more)

    def zero_grad(self) -> None:
        """Drop the gradients of all backward passes since the last step."""
        with self._lock:
            self._check_open()
            self._check_settled("dropping gradients")
            step = self.step_count + 1
            self._delivery.updates.forget_passes(step)  # who still has passes is told so by the next message
            self._passes = dict.fromkeys(self.experts, 0)
            self._accumulated = 0
            self._delivery.ask({"op": "forget", "step": step}, [(id, "", 0, 0, 0) for id in self.experts], {})

    def gradients(self) -> dict[str, bytes]:
        """The gradients since the last step of each expert that has any, by id: the bytes of a safetensors file."""
        with self._lock:
            self._check_open()
            having = [id for id, passes in self._passes.items() if passes]
            return {id: self._content("gradients", id) for id in having}

    def weights(self) -> dict[str, bytes]:
        """The weights of each candidate, by id: the bytes of a safetensors file."""
        with self._lock:
            self._check_open()
            return {id: self._content("weights", id) for id in self.experts}

    def load(self, weights: Mapping[str, bytes]) -> StepResult:
        """Take weights of experts, by id, as the next step: the bytes of safetensors files with all their tensors.

        This is how an optimizer of your own updates the experts. Experts that are not named stay as they are. Raises
        SpecMismatch for weights that do not fit or are not finite, and InvalidRequest for an expert of no session.
        """
        with self._lock:
            self._check_open()
            if unknown := sorted(weights.keys() - set(self.experts)):
                raise InvalidRequest(f"{unknown[0]!r} is no expert of this session")
            if self.optimizer is not None:
                raise FailedPrecondition("this session has an optimizer, which updates the experts: call step()")
            given = {id: {"data": WireTensor("uint8", (len(data),), data)} for id, data in weights.items()}
            step = self.step_count + 1
            if self._loading is None:
                for id, tensors in given.items():  # all of them or none
                    self._delivery.ask({"op": "check", "step": step}, [(id, "", 0, 0, 0)], tensors, may_leave=False)
                self._loading = dict(weights)
            elif self._loading != dict(weights):
                raise FailedPrecondition("the last load was not finished: load the same weights again first")
            for id in self.experts:
                tensors = given.get(id, {})
                meta, parts = {"op": "load", "step": step}, [(id, "", 0, 0, 0)]
                self._delivery.ask(meta, parts, tensors, may_leave=False)
            for id in self.experts:
                self._delivery.updates.add(
                    step, ({"op": "load", "step": step}, given.get(id, {})), [(id, "", 0, 0, 0)], closes=True
                )
            self._loading = None
            self._passes = dict.fromkeys(self.experts, 0)
            self._delivery.applied = step
            self._save_if_due()
            return self._result(applied=True, norm=0.0, updated=tuple(weights))

    def _save_if_due(self) -> None:
        every, size = self._options.durable_every, self._delivery.updates.nbytes
        if (every is not None and self.step_count - self.durable >= every) or size > self._options.replay_bytes:
            self.save()

    def save(self, caller: bytes | None = None) -> int:
        """Make the last step of all experts durable, weights and optimizers, and return its number.

        `caller` is kept with it, and given back as `saved` when the session is resumed: what you need to go on, such as
        your gate. Raises FailedPrecondition where the disk is full: the durable step stays so, and training goes on.
        """
        with self._lock:
            self._check_open()
            self._check_settled("saving")
            tensors = {} if caller is None else {"caller": WireTensor("uint8", (len(caller),), caller)}
            meta = {"op": "save", "step": self.step_count}
            pauses = self._delivery.pauses()
            while True:
                frame = self._delivery.send(meta, [], tensors)
                outcome = dict(frame.meta["outcomes"][0])
                if "ok" in outcome:
                    self._delivery.durable = int(frame.meta["durable"])
                    self._delivery.updates.durable(self.durable)
                    return self.durable
                if "behind" in outcome:
                    self._delivery.catch_up(str(frame.meta["expert"]), outcome)
                    continue
                error = error_of(outcome)
                pause = next(pauses, None)
                if not isinstance(error, Unavailable) or pause is None:
                    raise error
                time.sleep(pause)

    def publish(
        self,
        *,
        experts: Sequence[str] | None = None,
        gate: Any = None,
        max_drift: float | None = None,
        probe: Any = None,
        expect: Mapping[str, str] | None = None,
        allow_norm: bool = True,
        timeout: float = 60.0,
        **options: Any,
    ) -> SwapOutcome:
        """Swap what the candidates have learned in for what serves: experts, and the gate if given, in one epoch.

        `experts` are the ids of those that are published, by default all; `gate` is an object with a `save(path)`
        method, as those of `expertmesh.gates`, or a file. `max_drift` bounds the relative L2 distance between old and
        new answers of each expert: on the rows `probe` [T, ...] where they are given, else on the probe rows of the
        swap. `expect` are the versions that must serve now, by default those that the session began with or published
        last. `options` are those of `Client.swap`. The session goes on from what it has published.

        Raises FailedPrecondition for a candidate whose weights are not finite, or beyond `max_drift`, Aborted where
        another swap has replaced an expert since the session was opened, and the errors of a swap: what serves then
        serves on, and the session has lost nothing.
        """
        with self._lock:
            self._check_open()
            self._check_settled("publishing")
            chosen = self.experts if experts is None else tuple(experts)
            if unknown := sorted(set(chosen) - set(self.experts)):
                raise InvalidRequest(f"{unknown[0]!r} is no expert of this session")
            if probe is not None:
                check_probe(self, self._connection, chosen, probe, max_drift)
                max_drift = None
            contents = {id: self._content("weights", id) for id in chosen}
            swap = {"max_drift": max_drift, "timeout": timeout, "allow_norm": allow_norm, **options}
            return self._publications.swap(contents, f"{self.layer}/gate", gate, expect, **swap)

    def abort(self) -> None:
        """End the session, and forget what it has learned since it was published last; idempotent."""
        with self._lock:
            if not self.closed:
                with suppress(NotFound):  # a first request may have ended it, whose answer was lost
                    self._delivery.send({"op": "close"}, [], {})
                self.closed = True

    def close(self) -> None:
        """Leave the session as it is, to be resumed by its `id` at its durable step."""
        self.closed = True

    def _content(self, operation: str, id: str) -> bytes:
        """The bytes that an operation returns for one expert."""
        chain = self._delivery.updates.chain(id, self.step_count + 1)
        frame, errors = self._delivery.ask(
            {"op": operation, "step": self.step_count + 1}, [(id, "", chain, 0, self._passes[id])], {}, may_leave=False
        )
        if errors or "data" not in frame.tensors:
            raise DataLoss(f"{operation} of {id} did not come")
        return bytes(frame.tensors["data"].data)

    def _check_open(self) -> None:
        if self.closed:
            raise FailedPrecondition("this session is closed: open another one, or resume it by its id")

    def _check_settled(self, what: str) -> None:
        if self._loading is not None:
            raise FailedPrecondition(f"the last load was not finished: load the same weights again before {what}")
        if self._pending is not None:
            raise FailedPrecondition(f"the last step was not finished: call step() again before {what}")
