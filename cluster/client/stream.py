"""The client's side of a stream: sends and receives chunks over a gRPC call (gRPC is not imported here)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from ...experts.errors import ExpertMeshError
from ...experts.wire import Buffer
from ..rpc.streams import ADMITTED, Streamed, StreamedAnswer


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
