"""The gRPC channels of a client, one to each router, and streams over them: sent and received in chunks."""

from __future__ import annotations

import asyncio
import threading
import uuid
from contextlib import suppress
from typing import Any

import grpc

from ....experts.errors import ExpertMeshError, FailedPrecondition
from ....experts.wire import Buffer
from ...rpc.channel_options import client_options
from ...rpc.status import from_status
from ...rpc.streams import ADMITTED, Streamed, StreamedAnswer
from .balance import Target

CUT_OFF = ("Socket closed", "Connection reset", "GOAWAY")
"""What gRPC says, among others, when a client without TLS speaks to a port with TLS."""


class Channels:
    """Channels of `module`, `grpc` or `grpc.aio`: opened by the first call, cut if the router is lost. Thread-safe."""

    def __init__(self, module: Any, *, ca_cert: bytes | None, max_message_bytes: int) -> None:
        self.closed = False
        self._module = module
        self._ca_cert = ca_cert
        self._max_message_bytes = max_message_bytes
        self._lock = threading.Lock()
        self._open: dict[Target, Any] = {}

    @property
    def targets(self) -> tuple[Target, ...]:
        """The routers to which there is a channel."""
        return tuple(self._open)

    def check_open(self) -> None:
        """Raise FailedPrecondition once the client is closed."""
        if self.closed:
            raise FailedPrecondition("this client is closed: create a new one")

    def to(self, target: Target) -> Any:
        """The channel to a router, which connects when it is used. Raises FailedPrecondition if they are closed."""
        with self._lock:
            if target not in self._open:
                self.check_open()
                self._open[target] = self._opened(target)
            return self._open[target]

    def was_cut(self, target: Target, channel: Any) -> bool:
        """Whether a channel was closed alone, because its router was lost."""
        return not self.closed and self._open.get(target) is not channel

    def cut(self, target: Target) -> list[Any]:
        """Forget the channel to a router, if there is one; the caller closes it."""
        with self._lock:
            return [self._open.pop(target)] if target in self._open and not self.closed else []

    def close(self) -> list[Any]:
        """Open no more channels; the caller closes those that there are."""
        with self._lock:
            self.closed = True
            return list(self._open.values())

    def translate(self, error: Any, target: Target) -> ExpertMeshError:
        """Convert an error of gRPC into an ExpertMeshError, with the table in rpc/status.py."""
        text = error.details() or ""
        in_the_clear = self._ca_cert is None and target.connect_to == target.address
        if in_the_clear and error.code() is grpc.StatusCode.UNAVAILABLE and any(end in text for end in CUT_OFF):
            text += "; does the port speak TLS? Then pass ca_cert="
        return from_status(error.code().name, text, error.trailing_metadata() or ())

    def _opened(self, target: Target) -> Any:
        """A new channel, whose user agent tells it from others."""
        options: list[tuple[str, Any]] = [("grpc.primary_user_agent", f"expertmesh/{uuid.uuid4().hex}")]
        options += client_options(self._max_message_bytes, loopback=target.loopback)
        if target.authority is not None:
            options += [("grpc.ssl_target_name_override", target.authority)]
        if self._ca_cert is None:
            return self._module.insecure_channel(target.connect_to, options=options)
        credentials = grpc.ssl_channel_credentials(root_certificates=self._ca_cert)
        return self._module.secure_channel(target.connect_to, credentials, options=options)


def exchange(stream: Any, most: int) -> Buffer | ExpertMeshError:
    """Read the reply of a stream whose requests gRPC reads from an iterator; `most` bounds the reply's bytes.

    Raises the errors of gRPC.
    """
    answer = StreamedAnswer(most)
    try:
        for message in stream:
            answer.take(message)
        return answer.finish()
    except ExpertMeshError as error:
        return error
    finally:
        stream.cancel()  # which does nothing to one that is over


async def exchange_async(stream: Any, sent: Streamed) -> Buffer | ExpertMeshError:
    """Send a request over a gRPC asyncio stream and return the reply. Raises the errors of gRPC."""
    answer = StreamedAnswer(sent.most)
    try:
        with suppress(asyncio.InvalidStateError):  # the server has ended the stream: reading raises the reason
            await _send(stream, sent)
        async for message in stream:
            answer.take(message)
        return answer.finish()
    except ExpertMeshError as error:
        return error
    finally:
        stream.cancel()  # which does nothing to one that is over


async def _send(stream: Any, sent: Streamed) -> None:
    """Send the opening, then the rest once admitted: gRPC loses the status of a stream that ends during a write."""
    messages = sent.messages()
    await stream.write(next(messages))
    if ADMITTED in tuple(await stream.initial_metadata()):
        for message in messages:
            await stream.write(message)
        await stream.done_writing()
