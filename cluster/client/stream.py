"""A stream from the client's side, over a call of gRPC's (not imported here): sent in chunks, received in chunks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from ...experts.errors import ExpertMeshError
from ...experts.wire import Buffer
from ..rpc.streams import ADMITTED, Streamed, StreamedAnswer


def exchange(stream: Any, most: int) -> Buffer | ExpertMeshError:
    """The reply to a stream whose requests gRPC takes from an iterator by itself; `most` bounds its bytes.

    Raises what gRPC raises.
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
    """Send, and return the reply, over a stream of gRPC's asyncio layer. Raises what gRPC raises."""
    answer = StreamedAnswer(sent.most)
    try:
        with suppress(asyncio.InvalidStateError):  # the server has ended it: reading says why
            await _send(stream, sent)
        async for message in stream:
            answer.take(message)
        return answer.finish()
    except ExpertMeshError as error:
        return error
    finally:
        stream.cancel()  # which does nothing to one that is over


async def _send(stream: Any, sent: Streamed) -> None:
    """Announce, and go on once the server agrees: gRPC loses the status of a stream that ends during a write."""
    messages = sent.messages()
    await stream.write(next(messages))
    if ADMITTED in tuple(await stream.initial_metadata()):
        for message in messages:
            await stream.write(message)
        await stream.done_writing()
