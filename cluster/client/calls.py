"""What a client can ask, as flows without I/O: frames and metadata out, replies and errors in.

Both clients run these very flows; neither repeats any of it. The docstrings here are those of the clients' methods.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from ...experts.errors import DataLoss, ExpertMeshError, InvalidRequest, TooLarge
from ...experts.protocol import CallOptions, from_mapping
from ...experts.spec import is_number
from ...experts.wire import Buffer, Frame, WireTensor, decode, encode_parts
from ..rpc import health
from ..rpc.channel_options import MAX_MESSAGE_BYTES
from ..rpc.documents import decode_document
from ..rpc.methods import SERVICE, new_request_id
from ..rpc.status import REQUEST_ID_KEY, is_request_id
from ..rpc.streams import MAX_REQUEST_BYTES, Streamed
from ..rpc.swaps import Lease
from .arrays import to_wire
from .half_precision import AS_IT_IS, check_payload_dtype
from .reply import Reply, read_reply
from .retry import Flow, Retries, RetryBudget, RetryPolicy
from .seen_epoch import SeenEpoch

STREAM_SHARE = 4
"""A request of more than this part of the message limit goes in chunks: its reply may be this much larger than it."""

Array = TypeVar("Array")
_TOKEN = re.compile(r"[!-~]{1,4096}")


def new_retries(policy: RetryPolicy) -> Retries:
    """Retries by the real clock and real chance, with a full budget."""
    return Retries(policy=policy, budget=RetryBudget(), clock=time.monotonic, jitter=random.random)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The methods of a cluster as flows, for one token; `timeout` in seconds is that of calls that name none."""

    token: str = field(repr=False)
    timeout: float = 30.0
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_request_bytes: int = MAX_REQUEST_BYTES
    payload_dtype: str | None = None
    retries: Retries = field(default_factory=lambda: new_retries(RetryPolicy()), repr=False)
    new_id: Callable[[], str] = field(default=new_request_id, repr=False)
    seen_epoch: SeenEpoch = field(default_factory=SeenEpoch, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not _TOKEN.fullmatch(self.token):
            raise InvalidRequest("the token must be printable ASCII without spaces")
        _check_timeout(self.timeout)
        if type(self.max_message_bytes) is not int or not 0 < self.max_message_bytes < 2**31:
            raise InvalidRequest("max_message_bytes must be an int above 0 and below 2 GiB")
        if type(self.max_request_bytes) is not int or self.max_request_bytes <= 0:
            raise InvalidRequest("max_request_bytes must be an int above 0")
        check_payload_dtype(self.payload_dtype)

    def forward(self, /, layer: str, x: Array, **options: Any) -> Flow[Array]:
        """Send rows `x` [T, ...] through a layer; return its output [T, ...], of the kind of `x`.

        Takes the options of `call` and raises what `call` raises.
        """
        reply = yield from self.call(layer, x, **options)
        output: Array = reply.output
        return output

    def call(
        self,
        layer: str,
        x: Any,
        *,
        gate_input: Any = None,
        top_k_index: Any = None,
        top_k_weights: Any = None,
        top_k: int | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        on_missing: str | None = None,
        max_lost_mass: float | None = None,
        return_routing: bool = False,
        epoch: int | None = None,
        pin: Lease | str | None = None,
        raw: bool = False,
        payload_dtype: str | None = None,
        stream: bool | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Flow[Reply]:
        """Send rows `x` [T, ...] through a layer; return the output with its epoch, versions and losses.

        `x` is a numpy array, what numpy makes one of, or a torch tensor, which may be on a GPU; the reply's arrays are
        of the same kind on the same device. Without torch, bfloat16 answers come as float32; `raw=True` leaves them as
        uint16 bits, and sends uint16 arrays as bfloat16.

        `gate_input` [T, ...] is what the gate looks at in place of `x`. `top_k_index` [T, K] and `top_k_weights`
        [T, K] bring the routing, and the gate is skipped. `top_k`, and `allow` and `deny` (ids of experts), narrow the
        gate's choice. `on_missing` ("error", "renormalize", "residual", "fallback:<expert>") and `max_lost_mass` say
        what becomes of rows whose expert gives no answer. `epoch` asks for the very versions of an epoch that is kept,
        as that of an earlier reply, and `pin` for those of a lease.

        `payload_dtype` "float16" or "bfloat16" sends float32 rows (`x` and `gate_input`) in half the bytes, and makes
        float32 of what is answered in half; by default the client's, and "float32" sends rows as they are. They are
        rounded to nearest even, so each has a relative error of up to 2**-11 or 2**-8, the answer is rounded likewise,
        and a gate may choose otherwise where two scores are close.

        `stream` True sends the request in chunks and lets the reply come so, as it must where it exceeds
        `max_message_bytes`; None does so where the request exceeds a quarter of that. Arrays that are sent so must not
        be changed before the call ends. `timeout` is in seconds; `request_id` names the call in logs, and is made up
        where it is None.

        Raises InvalidRequest, NotFound, TooLarge, Overloaded, Unavailable, DeadlineExceeded, FailedPrecondition (also
        for an epoch that is not kept any more), Unauthenticated or PermissionDenied. A call that was answered
        Unavailable has been retried, within its timeout and the client's budget.
        """
        narrow = _narrow(self.payload_dtype if payload_dtype is None else payload_dtype)
        rows, routing = {"x": x, "gate_input": gate_input}, {"top_k_index": top_k_index, "top_k_weights": top_k_weights}
        described = {
            k: to_wire(value, name=k, raw=raw, narrow=narrow) for k, value in rows.items() if value is not None
        }
        described |= {k: to_wire(value, name=k, raw=raw) for k, value in routing.items() if value is not None}
        if "x" not in described:
            raise InvalidRequest("x must be an array of rows, not None")
        tensor_x, kind = described["x"]
        if not tensor_x.shape:
            raise InvalidRequest("x must have a first dimension, its rows; a single row is x[None]")
        options = CallOptions(
            layer=layer,
            request_id=self.new_id() if request_id is None else request_id,
            top_k=top_k,
            allow=_names(allow),
            deny=_names(deny),
            on_missing=on_missing,
            max_lost_mass=max_lost_mass,
            return_routing=return_routing,
            epoch=epoch,
            pin=pin.pin if isinstance(pin, Lease) else pin,
            **self.seen_epoch.options(),
        )
        tensors = {name: tensor for name, (tensor, _) in described.items()}
        frame = yield from self._call(_set_fields(options), tensors, stream, timeout, options.request_id)
        reply = read_reply(frame, rows=tensor_x.shape[0], kind=kind)
        self.seen_epoch.note(reply.cluster, reply.epoch)
        return reply

    def status(self, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """The state of the cluster as a JSON object: layers, experts, versions, replicas."""
        frame = yield from self._ask("Status", {}, {}, timeout, self.new_id())
        return decode_document(frame, "status")

    def drain(self, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """Let the cluster finish what it has accepted and take no more calls; returns its status. For operators."""
        frame = yield from self._ask("Drain", {}, {}, timeout, self.new_id())
        return decode_document(frame, "status")

    def health(self, service: str = "", *, timeout: float | None = None) -> Flow[str]:
        """What the health protocol says now, without a retry: "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN", "UNKNOWN".

        Raises NotFound for a service that the server does not know, Unavailable when there is no server.
        """
        request = health.encode_request(service)
        once = replace(self.retries, policy=RetryPolicy(attempts=1))
        answer = yield from self._send(once, health.CHECK, request, timeout, self.new_id())
        try:
            return health.decode_response(bytes(answer)).name
        except InvalidRequest as error:
            raise DataLoss(f"the health reply cannot be read: {error}") from None

    def _ask(
        self, method: str, meta: dict[str, Any], tensors: dict[str, WireTensor], timeout: float | None, request_id: Any
    ) -> Flow[Frame]:
        parts = encode_parts(method.lower(), meta, tensors)
        return (yield from self._ask_once(method, parts, timeout, request_id))

    def _call(
        self,
        meta: dict[str, Any],
        tensors: dict[str, WireTensor],
        stream: bool | None,
        timeout: float | None,
        request_id: Any,
    ) -> Flow[Frame]:
        """Call with one message where the request is small, so that the reply has room in one too; else in chunks."""
        parts = encode_parts("call", meta, tensors)
        size = sum(len(part) for part in parts)
        if stream is False or (stream is None and size <= self.max_message_bytes // STREAM_SHARE):
            return (yield from self._ask_once("Call", parts, timeout, request_id))
        if size > self.max_request_bytes:
            raise TooLarge(
                f"the request has {size} bytes, max_request_bytes of this client is {self.max_request_bytes}: "
                "send fewer rows at a time, or raise it here and at the server"
            )
        streamed = Streamed.of(parts, max_message_bytes=self.max_message_bytes, most=self.max_request_bytes)
        answer = yield from self._send(self.retries, f"/{SERVICE}/CallStream", streamed, timeout, request_id)
        return _decoded(answer, self.max_request_bytes, request_id)

    def _ask_once(self, method: str, parts: list[Buffer], timeout: float | None, request_id: Any) -> Flow[Frame]:
        """Ask with one message, joined from its parts: the only copy of them that is made here."""
        size = sum(len(part) for part in parts)
        if size > self.max_message_bytes:
            raise TooLarge(
                f"the request has {size} bytes, max_message_bytes of this client is {self.max_message_bytes}: "
                "send fewer rows at a time, or raise it here and at the server"
            )
        answer = yield from self._send(self.retries, f"/{SERVICE}/{method}", b"".join(parts), timeout, request_id)
        return _decoded(answer, self.max_message_bytes, request_id)

    def _send(
        self, retries: Retries, method: str, payload: bytes | Streamed, timeout: float | None, request_id: Any
    ) -> Flow[Buffer]:
        if not is_request_id(request_id):
            raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : / -")
        seconds = self.timeout if timeout is None else _check_timeout(timeout)
        metadata = (("authorization", f"Bearer {self.token}"), (REQUEST_ID_KEY, request_id))
        try:
            return (yield from retries.attempts(method, payload, timeout=seconds, metadata=metadata))
        except ExpertMeshError as error:
            if error.request_id is None:
                error.request_id = request_id
            raise


def _decoded(answer: Buffer, most: int, request_id: Any) -> Frame:
    try:
        return decode(answer, max_bytes=most)
    except InvalidRequest as error:
        raise DataLoss(f"the reply cannot be read: {error}", request_id=request_id) from None


def _narrow(payload_dtype: object) -> str | None:
    """The dtype that float32 rows are to be sent in, None for their own."""
    check_payload_dtype(payload_dtype)
    return payload_dtype if isinstance(payload_dtype, str) and payload_dtype != AS_IT_IS else None


def _check_timeout(timeout: float) -> float:
    if not is_number(timeout):
        raise InvalidRequest("timeout must be a number of seconds")
    if not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest(f"timeout must be a finite number of seconds above 0, not {timeout}")
    return float(timeout)


def _names(names: Sequence[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise InvalidRequest(f"allow and deny take a list of experts: [{names!r}]")
    return None if names is None else list(names)


def _set_fields(options: CallOptions) -> dict[str, Any]:
    """The options that were given, checked here as the server will check them."""
    found = {item.name: getattr(options, item.name) for item in fields(options) if not _is_default(options, item)}
    from_mapping(CallOptions, found)
    return found


def _is_default(options: CallOptions, item: Field[Any]) -> bool:
    value = getattr(options, item.name)
    return value is item.default or (type(value) is type(item.default) and value == item.default)
