"""Sends one request as a flow without sockets: in one message or in chunks, with token, request id and retries.

What a client has seen goes with its calls, so that no later one is answered from an older epoch.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...experts.errors import DataLoss, ExpertMeshError, FailedPrecondition, InvalidRequest, RouterUnavailable, TooLarge
from ...experts.wire import Buffer, Frame, WireTensor, decode, encode_parts
from ..rpc import health
from ..rpc.channel_options import MAX_MESSAGE_BYTES, MAX_RECEIVED_BYTES
from ..rpc.methods import METHODS, SERVICE, Role, new_request_id
from ..rpc.status import LAYER_KEY, REQUEST_ID_KEY, is_request_id
from ..rpc.streams import MAX_REQUEST_BYTES, Streamed
from .half_precision import check_payload_dtype
from .requests import check_timeout
from .retry import Attempt, Beside, Flow, Payload, Received, Retries, RetryBudget, RetryPolicy
from .routers.balance import Balance, Route, Stay, Target
from .routers.watch import CHECK_SECONDS, Watch

STREAM_SHARE = 4
"""Requests above 1/4 of the message limit are sent in chunks: a reply may be that much larger than its request.

So is what is larger than the largest message that a server receives.
"""

LARGE_REPLIES = ("weights", "gradients", "resume")
"""The operations of training whose replies may be much larger than their requests."""

_TOKEN = re.compile(r"[!-~]{1,4096}")


def new_retries(policy: RetryPolicy) -> Retries:
    """Retries with the monotonic clock, random jitter and a full budget."""
    return Retries(policy=policy, budget=RetryBudget(), clock=time.monotonic, jitter=random.random)


def one_router() -> Balance:
    """The routers of a client that has been told of no address: one, whose address is not known here."""
    return Balance([Target(address="", connect_to="")], time.monotonic)


class SeenEpoch:
    """The highest epoch of the cluster that answered last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cluster = ""
        self._epoch = 0

    def note(self, cluster: str, epoch: int) -> None:
        """Record the epoch of a reply; a reply from another cluster replaces the old epoch."""
        if not cluster:
            return
        with self._lock:
            self._epoch = max(epoch, self._epoch) if cluster == self._cluster else epoch
            self._cluster = cluster

    def options(self) -> dict[str, Any]:
        """The options that a call sends for this."""
        with self._lock:
            return {"min_epoch": self._epoch, "cluster": self._cluster}


@dataclass(frozen=True, kw_only=True)
class Sending:
    """Sends requests to `routers`; `timeout` is the default of its calls, in seconds.

    A call carries the token of the lowest role that may make it, if `tokens` has one, else `token`. Calls that
    `stay` together go to one router until it fails. `look_up` is that of `Watch`.
    """

    token: str = field(repr=False)
    tokens: Mapping[Role, str] = field(default_factory=dict, repr=False)
    timeout: float = 30.0
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_request_bytes: int = MAX_REQUEST_BYTES
    payload_dtype: str | None = None
    retries: Retries = field(default_factory=lambda: new_retries(RetryPolicy()), repr=False)
    new_id: Callable[[], str] = field(default=new_request_id, repr=False)
    seen_epoch: SeenEpoch = field(default_factory=SeenEpoch, repr=False)
    routers: Balance = field(default_factory=one_router, repr=False)
    stay: Stay | None = None
    look_up: Callable[[], list[Target]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not _TOKEN.fullmatch(self.token):
            raise InvalidRequest("the token must be printable ASCII without spaces")
        check_timeout(self.timeout)
        if type(self.max_message_bytes) is not int or not 0 < self.max_message_bytes < 2**31:
            raise InvalidRequest("max_message_bytes must be an int above 0 and below 2 GiB")
        if type(self.max_request_bytes) is not int or self.max_request_bytes <= 0:
            raise InvalidRequest("max_request_bytes must be an int above 0")
        check_payload_dtype(self.payload_dtype)

    def _ask(
        self,
        method: str,
        meta: dict[str, Any],
        tensors: dict[str, WireTensor],
        timeout: float | None,
        request_id: Any,
        route: Route | None = None,
    ) -> Flow[Frame]:
        parts = encode_parts(method.lower(), meta, tensors)
        return (yield from self._ask_once(method, parts, timeout, request_id, "", route))

    def _ask_each(
        self, method: str, meta: dict[str, Any], timeout: float | None, *, every: bool = False
    ) -> Flow[list[tuple[str, Frame]]]:
        """Ask each router for what is its own; returns addresses and answers.

        Raises RouterUnavailable if none answers, or with `every` if one does not.
        """
        answers: list[tuple[str, Frame]] = []
        lost: RouterUnavailable | None = None
        for target in self.routers.targets:
            try:
                route = self.routers.route(only=target)
                frame = yield from self._ask(method, meta, {}, timeout, self.new_id(), route)
                answers.append((target.address, frame))
            except RouterUnavailable as error:
                lost = error
        if lost is not None and (every or not answers):
            raise lost
        return answers

    def _to_holder(self, pin: str | None) -> tuple[str | None, Route]:
        """The id of a lease as its router knows it, and the route there; any route if `pin` names no router.

        Raises FailedPrecondition if the router is none of this client's.
        """
        if not isinstance(pin, str) or "@" not in pin:
            return pin, self.routers.route(stay=self.stay)
        lease_id, _, address = pin.partition("@")
        targets = {target.address: target for target in self.routers.targets}
        only = next(iter(targets.values())) if len(targets) == 1 else targets.get(address)
        if only is None:
            raise FailedPrecondition(
                f"the lease belongs to the router at {address}, which is not among those of this client "
                f"({', '.join(targets)}): pin again, or name the epoch"
            )
        return lease_id, self.routers.route(only=only)

    def _call(
        self,
        meta: dict[str, Any],
        tensors: dict[str, WireTensor],
        stream: bool | None,
        timeout: float | None,
        route: Route,
    ) -> Flow[Frame]:
        """Send a request to a layer, whose `meta` are the fields of `CallOptions`."""
        try:
            return (yield from self._call_on(route, meta, tensors, stream, timeout))
        except RouterUnavailable as error:
            if "pin" in meta:
                advice = "the router that gave this lease takes no calls: pin again, or name the epoch"
                error.message = f"{advice}; {error.message}"
                error.args = (error.message,)
            raise

    def _call_on(
        self,
        route: Route,
        meta: dict[str, Any],
        tensors: dict[str, WireTensor],
        stream: bool | None,
        timeout: float | None,
    ) -> Flow[Frame]:
        """Send a small request as one message, so that its reply fits into one too; send larger ones in chunks."""
        parts, request_id = encode_parts("call", meta, tensors), meta["request_id"]
        size = sum(len(part) for part in parts)
        small = size <= min(self.max_message_bytes // STREAM_SHARE, MAX_RECEIVED_BYTES)
        if stream is False or (stream is None and small):
            return (yield from self._ask_once("Call", parts, timeout, request_id, meta["layer"], route))
        return (yield from self._in_chunks("CallStream", parts, timeout, request_id, meta["layer"], route))

    def training(
        self, method: str, meta: dict[str, Any], tensors: dict[str, WireTensor], timeout: float | None = None
    ) -> Flow[Frame]:
        """Send a message of training, by the method "Pass" or "Train"."""
        return (yield from self._trained(method, meta, tensors, timeout))

    def _trained(
        self, method: str, meta: dict[str, Any], tensors: dict[str, WireTensor], timeout: float | None
    ) -> Flow[Frame]:
        """Send a message of training, in chunks where it or its reply may be large."""
        parts, request_id = encode_parts("train", meta, tensors), self.new_id()
        size = sum(len(part) for part in parts)
        if meta["op"] not in LARGE_REPLIES and size <= min(self.max_message_bytes // STREAM_SHARE, MAX_RECEIVED_BYTES):
            return (yield from self._ask_once(method, parts, timeout, request_id))
        return (yield from self._in_chunks(f"{method}Stream", parts, timeout, request_id))

    def _in_chunks(
        self,
        method: str,
        parts: list[Buffer],
        timeout: float | None,
        request_id: Any,
        layer: str = "",
        route: Route | None = None,
    ) -> Flow[Frame]:
        size = sum(len(part) for part in parts)
        if size > self.max_request_bytes:
            raise TooLarge(
                f"the request has {size} bytes, but max_request_bytes of this client is {self.max_request_bytes}: "
                "send fewer rows per call, or raise it on both the client and the cluster"
            )
        streamed = Streamed.of(parts, max_message_bytes=self.max_message_bytes, most=self.max_request_bytes)
        answer = yield from self._send(
            self.retries, f"/{SERVICE}/{method}", streamed, timeout, request_id, layer, route
        )
        return decoded(answer, self.max_request_bytes, request_id)

    def _ask_once(
        self,
        method: str,
        parts: list[Buffer],
        timeout: float | None,
        request_id: Any,
        layer: str = "",
        route: Route | None = None,
    ) -> Flow[Frame]:
        """Send one message, joined from its parts; this is the only copy of them here."""
        size = sum(len(part) for part in parts)
        if size > self.max_message_bytes:
            raise TooLarge(
                f"the request has {size} bytes, but max_message_bytes of this client is {self.max_message_bytes}: "
                "send fewer rows per call, or raise it on both the client and the cluster"
            )
        if size > MAX_RECEIVED_BYTES:
            raise TooLarge(
                f"the request has {size} bytes, but one message may have at most {MAX_RECEIVED_BYTES}: send it in "
                "chunks, without stream=False"
            )
        payload = b"".join(parts)
        answer = yield from self._send(self.retries, f"/{SERVICE}/{method}", payload, timeout, request_id, layer, route)
        return decoded(answer, self.max_message_bytes, request_id)

    def _send(
        self,
        retries: Retries,
        method: str,
        payload: Payload,
        timeout: float | None,
        request_id: Any,
        layer: str = "",
        route: Route | None = None,
    ) -> Flow[Received]:
        """Send one request; naming its `layer` beside the frame lets a server refuse it before receiving it."""
        if not is_request_id(request_id):
            raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : / -")
        seconds = self.timeout if timeout is None else check_timeout(timeout)
        metadata = self._metadata(method, request_id)
        if is_request_id(layer):  # which metadata can carry
            metadata += ((LAYER_KEY, layer),)
        if self._watch.is_needed and self.routers.begin_watch():
            yield Beside(self._watch.run())
        route = self.routers.route(stay=self.stay) if route is None else route
        try:
            return (yield from retries.attempts(method, payload, route, timeout=seconds, metadata=metadata))
        except ExpertMeshError as error:
            if error.request_id is None:
                error.request_id = request_id
            raise

    @cached_property
    def _watch(self) -> Watch:
        return Watch(routers=self.routers, clock=self.retries.clock, check=self._check, look_up=self.look_up)

    def _check(self, target: Target) -> Attempt:
        """The attempt to ask a router for its health."""
        metadata = self._metadata(health.CHECK, self.new_id())
        return Attempt(health.CHECK, health.encode_request(""), CHECK_SECONDS, self.routers.check(target), metadata)

    def _metadata(self, method: str, request_id: str) -> tuple[tuple[str, str], ...]:
        token = self.tokens.get(METHODS.get(method.rpartition("/")[2], Role.ADMIN), self.token)
        return ("authorization", f"Bearer {token}"), (REQUEST_ID_KEY, request_id)


def decoded(answer: Received, most: int, request_id: Any) -> Frame:
    """The frame of a reply. Raises DataLoss."""
    if isinstance(answer, Frame):
        return answer
    try:
        return decode(answer, max_bytes=most)
    except InvalidRequest as error:
        raise DataLoss(f"the reply cannot be read: {error}", request_id=request_id) from None
