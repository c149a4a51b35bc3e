"""Answers the messages of training to one replica: passes through its experts, and the candidates of sessions.

A message names an operation and its parts, each (expert, version, start, stop, number): pairs `start:stop` of `index`
[N] into `rows` [R, ...]. Without a session the parts are computed by the versions that serve, which learn nothing. A
part that fails does not affect the others; its outcome says how.

    forward   rows, index; keep?                outputs [N, ...] of the parts that answered, one after the other
    backward  rows, index, gradients, weights   rows [R, ...] and weights [N]: gradients; the parts' passes by number
    forget    -                                 drops the gradients of the next step
    update    -                                 one step of the optimizer; number = its passes, start = the chain
                                                of their seeds
    check     data                              whether the caller's weights could be loaded
    load      data?                             the caller's weights, as a step; without them it changes nothing
    gradients, weights, state                   data: safetensors, of one part
    open      data?                             a candidate: a copy of the version, in the saved state if there is one
    close     -                                 drops candidates, and copies of them
    add       values, sizes                     counts a pass that was computed in slices; number = that of the pass
    copy      data                              a copy of a candidate of another replica, before `step`

With `sliced`, forward and backward are of slices of the parts: number = that of the slice, and backward counts nothing
but returns the gradients of the parameters: values [G] of all parts, and sizes [P, 3], in front the position of the
part; and those of rows by pair, pairs [N, ...], to be added up in an order that is not that of replicas. With `copied`
they are computed by copies of candidates that are at another replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..construct.factory import RowFunction
from ..errors import ConfigError, ExpertMeshError, FailedPrecondition, InvalidRequest, SpecMismatch, VersionGone
from ..protocol import TrainCall, TrainReply
from ..sums.device_rows import to_device, to_host_all
from .candidate import Candidate, TrainedBy
from .ledger import OutOfStep
from .passes import backward
from .slices import pack, seed_of_slice

log = logging.getLogger(__name__)
Outcome = dict[str, Any]
Part = tuple[str, str, int, int, int]
Find = Callable[[str, str | None], RowFunction | None]
Owner = tuple[Any, Any]
"""A session and its generation, which tell with the step what a candidate is."""

MOST_KEPT = 4
"""Of how many forward passes a candidate keeps what their backward passes need: the layers of a model, say."""


class TrainingDesk:
    """The candidates of one replica, at most one for each expert. One thread at a time uses it.

    `find` returns the function of an expert in a version, or in any that is loaded if the version is None.
    """

    def __init__(self, find: Find, device: str) -> None:
        self._find = find
        self._device = device
        self._candidates: dict[str, tuple[Owner, Candidate]] = {}
        self._copies: dict[str, tuple[Owner, Candidate]] = {}

    def answer(self, call: TrainCall) -> TrainReply:
        """Carry out an operation; the host fills in `incarnation`. Raises InvalidRequest for what is malformed."""
        operation, parts = call.meta.get("op"), _parts(call)
        if operation == "forward":
            return self._forward(call, parts)
        if operation == "backward":
            return self._backward(call, parts)
        data: dict[str, Tensor] = {}
        outcomes = tuple(self._guarded(part, partial(self._single, call, part, data)) for part in parts)
        return TrainReply("", outcomes, data)

    def _forward(self, call: TrainCall, parts: list[Part]) -> TrainReply:
        rows, index = self._rows(call, parts)
        (session, step, seed), training = _session(call), call.meta.get("training") is not False
        keep = MOST_KEPT if call.meta.get("keep") is True else 0
        of_rows, sliced = call.meta.get("of_rows") is not False, call.meta.get("sliced") is True
        outputs: list[Tensor] = []

        @torch.no_grad()
        def one(part: Part) -> Outcome:
            expert, version, start, stop, number = part
            own = rows.index_select(0, index[start:stop])
            if session:
                candidate = self._computing(call, expert)
                if candidate is None:
                    return {"absent": True}
                drawn = seed_of_slice(seed, number) if sliced else seed
                answers = candidate.forward(own, step, drawn, training=training, keep=keep, of_rows=of_rows)
            else:
                function = self._find(expert, version)
                if function is None:
                    return {"error": "VersionGone", "message": f"{expert} {version} is not loaded in this replica"}
                answers = function(own)
            if outputs and (outputs[0].shape[1:], outputs[0].dtype) != (answers.shape[1:], answers.dtype):
                raise SpecMismatch(
                    f"it answers with rows of {list(answers.shape[1:])} {answers.dtype}, and other experts do not"
                )
            if not bool(answers.isfinite().all()):
                return {"error": "ExpertFailed", "message": f"{expert}: its answer is not finite (NaN or infinity)"}
            outputs.append(answers)
            return {"ok": True}

        outcomes = tuple(self._guarded(part, partial(one, part)) for part in parts)
        tensors = {"outputs": to_host_all([torch.cat(outputs)])[0]} if outputs else {}
        return TrainReply("", outcomes, tensors)

    def _backward(self, call: TrainCall, parts: list[Part]) -> TrainReply:
        rows, index = self._rows(call, parts)
        (session, step, seed), training = _session(call), call.meta.get("training") is not False
        of_rows, sliced = call.meta.get("of_rows") is not False, call.meta.get("sliced") is True
        gradients, weights = _tensor(call, "gradients", rows.shape[0]), call.tensors.get("weights")
        gradients = to_device(gradients, self._device)
        weights = None if weights is None else to_device(weights, self._device)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        wanted = of_rows and rows.is_floating_point()
        shape = (len(index), *rows.shape[1:]) if sliced else rows.shape
        total = torch.zeros(shape, dtype=wide, device=rows.device) if wanted else None
        by_weight = torch.zeros(len(index), dtype=wide, device=rows.device)
        values: list[Tensor] = []
        sizes: list[Tensor] = []

        def one(at: int, part: Part) -> Outcome:
            expert, version, start, stop, number = part
            own = index[start:stop]
            given = (rows.index_select(0, own), gradients.index_select(0, own))
            factors = None if weights is None else weights[start:stop]
            candidate = self._computing(call, expert) if session else None
            if session and candidate is None:
                return {"absent": True}
            if candidate is not None and sliced:
                drawn = seed_of_slice(seed, number)
                found = candidate.slice(*given, factors, step, drawn, training=training, of_rows=of_rows)
                own_values, own_sizes = pack(found.parameters)
                values.append(own_values)
                sizes.append(torch.cat([torch.full_like(own_sizes[:, :1], at), own_sizes], dim=1))
            elif candidate is not None:
                found = candidate.backward(*given, factors, step, number, seed, training=training, of_rows=of_rows)
            else:
                function = self._find(expert, version)
                if function is None:
                    return {"error": "VersionGone", "message": f"{expert} {version} is not loaded in this replica"}
                with function.alone():
                    rows_n = _as_served(function, given[0])
                    found = backward(_differentiable(function), rows_n, given[1], factors, (), None, of_rows=of_rows)
            if total is not None and found.rows_n is not None:
                where = torch.arange(start, stop, device=rows.device) if sliced else own
                total.index_add_(0, where, found.rows_n.to(wide))
            by_weight[start:stop] = found.weights_n.to(wide)
            return {"ok": True} if candidate is None or sliced else {"ok": True, "square": candidate.square}

        outcomes = tuple(self._guarded(part, partial(one, at, part)) for at, part in enumerate(parts))
        tensors = (
            {"weights": by_weight} if total is None else {"weights": by_weight, "pairs" if sliced else "rows": total}
        )
        if sizes:
            tensors["values"] = torch.cat(values)
        on_host = dict(zip(tensors, to_host_all(list(tensors.values())), strict=True))
        return TrainReply("", outcomes, on_host | ({"sizes": torch.cat(sizes)} if sizes else {}))

    def _single(self, call: TrainCall, part: Part, data: dict[str, Tensor]) -> Outcome:
        expert, version, chain, _, number = part
        operation = call.meta["op"]
        session, step, seed = _session(call)
        if operation == "open":
            return self._open(call, expert, version)
        if operation == "close":
            for held in (self._candidates, self._copies):
                if expert in held and held[expert][0][0] == session:
                    del held[expert]
            return {"ok": True}
        if operation == "copy":
            return self._copy(call, expert)
        candidate = self._candidate(call, expert)
        if candidate is None:
            return {"absent": True}
        if operation == "forget":
            candidate.forget_gradients(step)
            return {"ok": True}
        if operation == "add":
            packed = _tensor(call, "values"), _tensor(call, "sizes")
            candidate.add(packed, step, number, seed)
            return {"ok": True, "square": candidate.square}
        if operation == "update":
            lr, scale = call.meta.get("lr"), call.meta.get("scale", 1.0)
            try:
                return {"ok": True, **candidate.update(step, number, chain, lr, scale)}
            except (ExpertMeshError, OutOfStep):
                raise
            except BaseException:  # it may be half updated: it is opened again, at what is durable
                del self._candidates[expert]
                raise
        if operation == "check":
            candidate.check_weights(bytes(_tensor(call, "data").numpy()))
            return {"ok": True}
        if operation == "load":
            given = bytes(_tensor(call, "data").numpy()) if "data" in call.tensors else None
            return {"ok": True, **candidate.load(step, given)}
        if operation in ("weights", "state") and step != candidate.ledger.applied + 1:
            raise OutOfStep(candidate.ledger.applied, candidate.ledger.passes)
        content = {
            "gradients": lambda: candidate.gradients(step, number, chain),
            "weights": candidate.weights,
            "state": candidate.state,
        }
        if operation not in content:
            raise InvalidRequest(f"unknown operation {str(operation)[:64]!r}")
        data["data"] = as_tensor(content[operation]())
        ledger = candidate.ledger
        return {"ok": True, "applied": ledger.applied, "updates": ledger.updates}

    def _open(self, call: TrainCall, expert: str, version: str) -> Outcome:
        by = TrainedBy(call.meta.get("optimizer"), call.meta.get("arguments") or {})
        candidate = self._made(expert, version, by)
        if "data" in call.tensors:
            candidate.restore(bytes(_tensor(call, "data").numpy()))
        elif self._find(expert, version) is None:
            return {"error": "VersionGone", "message": f"{expert} {version} is not loaded in this replica"}
        self._candidates[expert] = _owner_of(call), candidate
        self._copies.pop(expert, None)  # this replica is the first one now, and computes with the candidate
        return {"ok": True, "applied": candidate.ledger.applied, "updates": candidate.ledger.updates}

    def _copy(self, call: TrainCall, expert: str) -> Outcome:
        self._copies.pop(expert, None)  # before another one takes memory
        copied = self._made(expert, None, TrainedBy())
        copied.follow(_session(call)[1], bytes(_tensor(call, "data").numpy()))
        self._copies[expert] = _owner_of(call), copied
        return {"ok": True}

    def _made(self, expert: str, version: str | None, by: TrainedBy) -> Candidate:
        function = self._find(expert, version) or self._find(expert, None)
        if function is None:  # its process has just begun, say
            raise VersionGone("no version of it is loaded in this replica yet")
        if function.module is None:
            raise ConfigError("it is not a torch module: only modules have parameters to train")
        return Candidate(function.module, by, function.rows_dtype, frozen=function.frozen, name=expert)

    def _computing(self, call: TrainCall, expert: str) -> Candidate | None:
        """What computes a pass here: a candidate, or a copy of one that is elsewhere, in the state asked for."""
        if call.meta.get("copied") is not True:
            return self._candidate(call, expert)
        held = self._copies.get(expert)
        at_step = held is not None and held[1].ledger.applied + 1 == call.meta.get("step")
        return held[1] if held is not None and at_step and held[0] == _owner_of(call) else None

    def _candidate(self, call: TrainCall, expert: str) -> Candidate | None:
        """The candidate of a session, unless it was left here: of an earlier generation, or behind what is durable."""
        held, durable = self._candidates.get(expert), call.meta.get("durable", 0)
        if held is None or held[0] != _owner_of(call):
            return None
        if isinstance(durable, int) and held[1].ledger.applied < durable:
            del self._candidates[expert]
            return None
        return held[1]

    def _guarded(self, part: Part, work: Callable[[], Outcome]) -> Outcome:
        """The outcome of a part, whatever its expert raises: it is foreign code."""
        try:
            return work()
        except OutOfStep as error:
            return {"behind": True, "applied": error.applied, "passes": error.passes}
        except ExpertMeshError as error:
            return {"error": type(error).__name__, "message": f"{part[0]}: {error.message}"}
        except BaseException as error:  # also a panic of Rust, or too little memory
            log.exception("expert raised in training", extra={"expert": part[0]})
            text = f"{part[0]} raised {type(error).__name__}: {str(error)[:300]}"
            return {"error": "ExpertFailed", "message": text}

    def _rows(self, call: TrainCall, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """The rows, and the index of their pairs, on the device. Raises InvalidRequest."""
        rows, index = _tensor(call, "rows"), _tensor(call, "index")
        if index.dtype != torch.int64 or index.ndim != 1 or not rows.ndim:
            raise InvalidRequest("index must be int64 [N], and rows must have a first dimension")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows.shape[0]:
            raise InvalidRequest("index points outside the rows")
        if any(not 0 <= start <= stop <= len(index) for _, _, start, stop, _ in parts):
            raise InvalidRequest("a part is outside the index")
        return to_device(rows, self._device), to_device(index, self._device)


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor, uint8 [n]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _differentiable(function: RowFunction) -> Callable[[Tensor], Tensor]:
    if not function.is_differentiable:
        raise FailedPrecondition("it is a function of numpy, which has no gradients: use one of torch")
    return function.function


def _as_served(function: RowFunction, rows: Tensor) -> Tensor:
    dtype = function.rows_dtype
    return rows.to(dtype) if dtype is not None and rows.is_floating_point() else rows


def _parts(call: TrainCall) -> list[Part]:
    parts = call.meta.get("parts")
    kinds = (str, str, int, int, int)
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest("a message of training must have parts")
    for part in parts:
        if not isinstance(part, list) or tuple(map(type, part)) != kinds:
            raise InvalidRequest("a part is [expert, version, start, stop, number]")
    return [tuple(part) for part in parts]


def _session(call: TrainCall) -> tuple[str, int, int]:
    """Session ("" for none), step and seed."""
    fields: Mapping[str, Any] = call.meta
    session, step, seed = fields.get("session", ""), fields.get("step", 0), fields.get("seed", 0)
    if not isinstance(session, str) or type(step) is not int or type(seed) is not int:
        raise InvalidRequest("session must be text, and step and seed whole numbers")
    return session, step, seed


def _owner_of(call: TrainCall) -> Owner:
    return call.meta.get("session"), call.meta.get("generation")


def _tensor(call: TrainCall, name: str, rows: int | None = None) -> Tensor:
    tensor = call.tensors.get(name)
    if not isinstance(tensor, Tensor) or (rows is not None and tensor.shape[:1] != (rows,)):
        raise InvalidRequest(f"a message of training lacks its tensor {name!r}, or has one of another length")
    return tensor
