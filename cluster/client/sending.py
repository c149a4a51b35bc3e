"""Sends one request as a flow without sockets: in one message or in chunks, with token, request id and retries."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...experts.errors import DataLoss, ExpertMeshError, InvalidRequest, TooLarge
from ...experts.wire import Buffer, Frame, WireTensor, decode, encode_parts
from ..rpc.channel_options import MAX_MESSAGE_BYTES, MAX_RECEIVED_BYTES
from ..rpc.methods import METHODS, SERVICE, Role, new_request_id
from ..rpc.status import LAYER_KEY, REQUEST_ID_KEY, is_request_id
from ..rpc.streams import MAX_REQUEST_BYTES, Streamed
from .half_precision import check_payload_dtype
from .requests import check_timeout
from .retry import Flow, Payload, Received, Retries, RetryBudget, RetryPolicy
from .seen_epoch import SeenEpoch

STREAM_SHARE = 4
"""Requests above 1/4 of the message limit are sent in chunks: a reply may be that much larger than its request.

So is what is larger than the largest message that a server receives.
"""

_TOKEN = re.compile(r"[!-~]{1,4096}")


def new_retries(policy: RetryPolicy) -> Retries:
    """Retries with the monotonic clock, random jitter and a full budget."""
    return Retries(policy=policy, budget=RetryBudget(), clock=time.monotonic, jitter=random.random)


@dataclass(frozen=True, kw_only=True)
class Sending:
    """Sends requests; `timeout` is the default of its calls, in seconds.

    A call carries the token of the lowest role that may make it, if `tokens` has one, else `token`.
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
        """Send a small request as one message, so that its reply fits into one too; send larger ones in chunks."""
        parts = encode_parts("call", meta, tensors)
        size = sum(len(part) for part in parts)
        small = size <= min(self.max_message_bytes // STREAM_SHARE, MAX_RECEIVED_BYTES)
        if stream is False or (stream is None and small):
            return (yield from self._ask_once("Call", parts, timeout, request_id, meta["layer"]))
        if size > self.max_request_bytes:
            raise TooLarge(
                f"the request has {size} bytes, but max_request_bytes of this client is {self.max_request_bytes}: "
                "send fewer rows per call, or raise it on both the client and the cluster"
            )
        streamed = Streamed.of(parts, max_message_bytes=self.max_message_bytes, most=self.max_request_bytes)
        method = f"/{SERVICE}/CallStream"
        answer = yield from self._send(self.retries, method, streamed, timeout, request_id, meta["layer"])
        return decoded(answer, self.max_request_bytes, request_id)

    def _ask_once(
        self, method: str, parts: list[Buffer], timeout: float | None, request_id: Any, layer: str = ""
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
        answer = yield from self._send(self.retries, f"/{SERVICE}/{method}", payload, timeout, request_id, layer)
        return decoded(answer, self.max_message_bytes, request_id)

    def _send(
        self,
        retries: Retries,
        method: str,
        payload: Payload,
        timeout: float | None,
        request_id: Any,
        layer: str = "",
    ) -> Flow[Received]:
        """Send one request; naming its `layer` beside the frame lets a server refuse it before receiving it."""
        if not is_request_id(request_id):
            raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : / -")
        seconds = self.timeout if timeout is None else check_timeout(timeout)
        token = self.tokens.get(METHODS.get(method.rpartition("/")[2], Role.ADMIN), self.token)
        metadata = [("authorization", f"Bearer {token}"), (REQUEST_ID_KEY, request_id)]
        if is_request_id(layer):  # which metadata can carry
            metadata.append((LAYER_KEY, layer))
        try:
            return (yield from retries.attempts(method, payload, timeout=seconds, metadata=tuple(metadata)))
        except ExpertMeshError as error:
            if error.request_id is None:
                error.request_id = request_id
            raise


def decoded(answer: Received, most: int, request_id: Any) -> Frame:
    """The frame of a reply. Raises DataLoss."""
    if isinstance(answer, Frame):
        return answer
    try:
        return decode(answer, max_bytes=most)
    except InvalidRequest as error:
        raise DataLoss(f"the reply cannot be read: {error}", request_id=request_id) from None
