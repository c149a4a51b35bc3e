"""The frames that router and replicas exchange on a channel: handshake, calls, replies, cancellations. No I/O.

A message is eight bytes of length, little endian, and one frame of `experts/wire.py`. The replica speaks first:

    replica   hello    {replica, incarnation, nonce}
    router    prove    {nonce, proof, router}             proof of the secret over both nonces and the incarnation
    replica   welcome  {proof, credits}                   the replica's proof, and how many calls may be in flight
    router    call     {attempt, timeout, parts, sums}    rows, index?, weights?
    replica   reply    {attempt, outputs, sums, failures, seconds} rows0, rows1, ... and lost?
    router    train    {attempt, timeout, ...}            an operation of training, with its own fields and tensors
    replica   trained  {attempt, outcomes, error, ...}    its tensors, or why the message could not be read
    router    cancel   {attempt}                          the reply is no longer needed
    replica   refused  {proof}                            the controller has given the router up; nothing follows

So a router sends no row to a process that does not know the secret, or to another incarnation than the one it expects.
Nothing is encrypted: between nodes, run the channel on a network as private as Ray's own.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import DeadlineExceeded, ExpertFailed, ExpertMeshError, InvalidRequest
from ...experts.protocol import ExpertCall, ExpertReply, Part, PartFailure, PartialSum, TrainCall, TrainReply
from ...experts.tensors import byte_view, dtype_name, from_wire
from ...experts.wire import MAX_TENSORS, Buffer, Frame, encode_scattered

LENGTH = struct.Struct("<Q")
NONCE_BYTES = 16
MOST_KINDS = MAX_TENSORS - 1
"""How many kinds of rows one reply carries, beside the list of lost pairs."""
ROUTER, REPLICA = b"expertmesh router", b"expertmesh replica"

Output = Tensor | PartFailure | None


def message(kind: str, **meta: Any) -> list[Buffer]:
    """A message without tensors."""
    return _framed(encode_scattered(kind, meta, {}))


def proof(secret: bytes, role: bytes, incarnation: str, nonces: Sequence[str]) -> str:
    """Prove knowledge of the secret for this connection: HMAC-SHA256 in hexadecimal."""
    text = b"\0".join([role, incarnation.encode(), *(nonce.encode() for nonce in nonces)])
    return hmac.new(secret, text, hashlib.sha256).hexdigest()


def encode_call(call: ExpertCall) -> list[Buffer]:
    """Encode a call; no tensor is copied."""
    tensors = {"rows": call.rows, "index": call.row_index, "weights": call.weights}
    meta = {
        "attempt": call.attempt,
        "timeout": call.timeout if math.isfinite(call.timeout) else None,
        "parts": [[part.expert, part.version, part.start, part.stop] for part in call.parts],
        "sums": [[total.first, total.last, total.start, total.stop] for total in call.sums],
    }
    wired = {name: _pieces([tensor]) for name, tensor in tensors.items() if tensor is not None}
    return _framed(encode_scattered("call", meta, wired))


def decode_call(frame: Frame) -> ExpertCall:
    """Decode a call, and check that its indices and ranges stay within its rows. Raises InvalidRequest."""
    meta, tensors = _expect(frame, "call", "attempt", "timeout", "parts", "sums"), frame.tensors
    if "rows" not in tensors or not tensors["rows"].shape or not tensors.keys() <= {"rows", "index", "weights"}:
        raise InvalidRequest("a call must carry rows, and may carry only index and weights besides")
    rows = from_wire(tensors["rows"])
    index = from_wire(tensors["index"]) if "index" in tensors else None
    weights = from_wire(tensors["weights"]) if "weights" in tensors else None
    if index is not None and (index.dtype != torch.int64 or index.ndim != 1):
        raise InvalidRequest("index must be int64 [N]")
    pairs = rows.shape[0] if index is None else index.shape[0]
    parts = tuple(Part(str(e), str(v), *_range(a, b, pairs)) for e, v, a, b in _lists(meta["parts"], 4))
    sums = tuple(
        PartialSum(*_range(first, last, len(parts)), *_range(a, b, rows.shape[0]))
        for first, last, a, b in _lists(meta["sums"], 4)
    )
    if index is not None and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows.shape[0]:
        raise InvalidRequest("index points outside the rows")
    if any(total.first == total.last for total in sums) or (sums and (weights is None or weights.shape != (pairs,))):
        raise InvalidRequest("sums need parts and one weight per pair")
    timeout = meta["timeout"]
    if not (timeout is None or isinstance(timeout, (int, float))):
        raise InvalidRequest("timeout must be a number of seconds")
    return ExpertCall(attempt_of(frame), parts, rows, index, weights, sums, math.inf if timeout is None else timeout)


def encode_reply(attempt: int, reply: ExpertReply, queued: float = 0.0) -> list[Buffer]:
    """Encode a reply; no tensor is copied. Outputs of the same dtype and row shape share one tensor.

    An output of one kind too many for a frame becomes a failure: the router could not decode the reply.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    failures: dict[PartFailure, int] = {}

    def entry(output: Output) -> list[int]:
        """[kind, rows], or [-1, 0] for no output, or [-2, index of the failure]."""
        if output is None:
            return [-1, 0]
        if isinstance(output, PartFailure):
            return [-2, failures.setdefault(output, len(failures))]
        kind = (dtype_name(output.dtype), tuple(output.shape[1:]))
        if kind not in kinds and len(kinds) == MOST_KINDS:
            return entry(PartFailure("ExpertFailed", f"the answers of one message have more than {MOST_KINDS} shapes"))
        kinds.setdefault(kind, []).append(output)
        return [list(kinds).index(kind), output.shape[0]]

    meta = {
        "attempt": attempt,
        "outputs": [entry(output) for output in reply.outputs],
        "sums": [entry(total) for total in reply.sums],
        "failures": [[failure.error, failure.message[:1000]] for failure in failures],
        "seconds": [queued, reply.computed],
    }
    wired = {f"rows{number}": _pieces(tensors) for number, tensors in enumerate(kinds.values())}
    if reply.lost is not None:
        wired["lost"] = _pieces([reply.lost])
    return _framed(encode_scattered("reply", meta, wired))


def decode_reply(frame: Frame, incarnation: str) -> ExpertReply:
    """Decode a reply. Its tensors share the frame's memory. Raises InvalidRequest."""
    meta = _expect(frame, "reply", "attempt", "outputs", "sums", "failures", "seconds")
    remaining = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
    failures = [PartFailure(str(error), str(text)) for error, text in _lists(meta["failures"], 2)]

    def read(kind: Any, count: Any) -> Output:
        if type(kind) is not int or type(count) is not int:
            raise InvalidRequest("the row counts of a reply must be integers")
        if kind == -1:
            return None
        if kind == -2 and 0 <= count < len(failures):
            failure: PartFailure = failures[count]
            return failure
        rows = remaining.get(f"rows{kind}")
        if rows is None or not 0 <= count <= rows.shape[0]:
            raise InvalidRequest("a reply names rows that it does not carry")
        remaining[f"rows{kind}"] = rows[count:]
        taken: Tensor = rows[:count]
        return taken

    outputs = tuple(read(*entry) for entry in _lists(meta["outputs"], 2))
    sums = tuple(read(*entry) for entry in _lists(meta["sums"], 2))
    ((queued, computed),) = _lists([meta["seconds"]], 2)
    if not isinstance(queued, float) or not isinstance(computed, float):
        raise InvalidRequest("the seconds of a reply must be two floats")
    return ExpertReply(incarnation, outputs, sums, remaining.get("lost"), queued, computed)


def encode_train(call: TrainCall) -> list[Buffer]:
    """Encode a message of training; no tensor is copied."""
    timeout = call.timeout if math.isfinite(call.timeout) else None
    meta = {**call.meta, "attempt": call.attempt, "timeout": timeout}
    return _framed(encode_scattered("train", meta, {name: _pieces([t]) for name, t in call.tensors.items()}))


def decode_train(frame: Frame) -> TrainCall:
    """Decode a message of training; the host checks what it says. Raises InvalidRequest."""
    meta, timeout = dict(frame.meta), frame.meta.get("timeout")
    if not (timeout is None or isinstance(timeout, (int, float))):
        raise InvalidRequest("timeout must be a number of seconds")
    tensors = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
    return TrainCall(attempt_of(frame), meta, tensors, math.inf if timeout is None else timeout)


def encode_trained(attempt: int, reply: TrainReply | PartFailure) -> list[Buffer]:
    """Encode the answer to a message of training, or why there is none; no tensor is copied."""
    if isinstance(reply, PartFailure):
        return message("trained", attempt=attempt, outcomes=[], error=reply.error, problem=reply.message[:1000])
    outcomes = [dict(outcome) for outcome in reply.outcomes]
    meta = {"attempt": attempt, "outcomes": outcomes, "error": "", "problem": ""}
    return _framed(encode_scattered("trained", meta, {name: _pieces([t]) for name, t in reply.tensors.items()}))


def decode_trained(frame: Frame, incarnation: str) -> TrainReply | ExpertMeshError:
    """Decode the answer to a message of training, or its error. Its tensors share the frame's memory.

    Raises InvalidRequest.
    """
    meta = _expect(frame, "trained", "attempt", "outcomes", "error", "problem")
    outcomes = meta["outcomes"]
    texts = isinstance(meta["problem"], str) and isinstance(meta["error"], str)
    if not texts or not isinstance(outcomes, list):
        raise InvalidRequest("the answer to a message of training must have outcomes")
    if meta["error"]:
        kind = {error.__name__: error for error in (DeadlineExceeded, InvalidRequest)}.get(meta["error"], ExpertFailed)
        return kind(meta["problem"])
    if not all(isinstance(outcome, dict) for outcome in outcomes):
        raise InvalidRequest("the outcomes of a message of training must be maps")
    tensors = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
    return TrainReply(incarnation, tuple(outcomes), tensors)


def attempt_of(frame: Frame) -> int:
    """The attempt of a call, reply or cancellation. Raises InvalidRequest."""
    attempt = frame.meta.get("attempt")
    if type(attempt) is not int:
        raise InvalidRequest(f"a {frame.kind} must have an integer attempt")
    return attempt


def text_of(frame: Frame, kind: str, *names: str) -> list[str]:
    """The text fields of a handshake message. Raises InvalidRequest for a message of another kind."""
    meta = _expect(frame, kind, *names)
    if not all(isinstance(meta[name], str) for name in names) or frame.tensors:
        raise InvalidRequest(f"{kind} must carry {', '.join(names)} as text and no tensors")
    return [meta[name] for name in names]


def _framed(parts: list[Buffer]) -> list[Buffer]:
    return [LENGTH.pack(sum(map(len, parts))) + bytes(parts[0]), *parts[1:]]


def _pieces(tensors: Sequence[Tensor]) -> tuple[str, tuple[int, ...], list[Buffer]]:
    first = tensors[0]
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return dtype_name(first.dtype), shape, [byte_view(tensor) for tensor in tensors]


def _expect(frame: Frame, kind: str, *names: str) -> dict[str, Any]:
    if frame.kind != kind or frame.meta.keys() != set(names):
        raise InvalidRequest(f"expected a message of kind {kind} with {', '.join(names)}")
    return frame.meta


def _lists(value: Any, length: int) -> list[list[Any]]:
    if not isinstance(value, list) or any(not isinstance(entry, list) or len(entry) != length for entry in value):
        raise InvalidRequest(f"expected a list of lists of length {length}")
    return value


def _range(start: Any, stop: Any, end: int) -> tuple[int, int]:
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= end:
        raise InvalidRequest(f"{start}:{stop} is not a range within 0:{end}")
    return start, stop
