"""Streams without any I/O: what is announced, how messages are cut, and every way in which a stream can be wrong."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.rpc.streams import (
    CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    Assembly,
    Opening,
    Streamed,
    StreamedAnswer,
    chunks,
    read_opening,
)
from expertmesh.experts import wire
from expertmesh.experts.errors import DataLoss, ExpertMeshError, InvalidRequest, TooLarge

MIB = 2**20


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_what_is_cut_is_put_together_again(parts: list[bytes], size: int) -> None:
    whole = b"".join(parts)
    cut = list(chunks([memoryview(part) for part in parts], size))
    assert b"".join(cut) == whole
    assert all(len(chunk) == size for chunk in cut[:-1])
    assert all(0 < len(chunk) <= size for chunk in cut)
    if not whole:
        return
    assembly = Assembly(len(whole))
    for chunk in cut:
        assembly.take(chunk)
    assert assembly.finish() == whole
    assert assembly.finish().readonly


def test_a_stream_is_sent_again_as_it_was() -> None:
    streamed = Streamed.of([b"abc", memoryview(b"defg")], most=100)
    assert list(streamed.messages()) == list(streamed.messages())
    assert read_opening(next(streamed.messages())) == Opening(total=7, chunk=CHUNK_BYTES)
    assert "abc" not in repr(streamed)


@pytest.mark.parametrize(("limit", "chunk"), [(64 * MIB, CHUNK_BYTES), (100_000, 100_000), (10, LEAST_CHUNK_BYTES)])
def test_chunks_fit_into_messages(limit: int, chunk: int) -> None:
    assert Streamed.of([], max_message_bytes=limit, most=1).chunk == chunk


GOOD: dict[str, Any] = {"total": 10, "chunk": 4096}
BAD_OPENINGS: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"\x00" * 40,
    "half a frame": Opening(total=10).encode()[:-1],
    "a call": wire.encode("call", GOOD),
    "with a tensor": wire.encode("stream", GOOD, {"x": wire.WireTensor("uint8", (1,), b"1")}),
    "no total": wire.encode("stream", {}),
    "an unknown field": wire.encode("stream", GOOD | {"more": 1}),
    "a total of 0": wire.encode("stream", GOOD | {"total": 0}),
    "a negative total": wire.encode("stream", GOOD | {"total": -1}),
    "a total of text": wire.encode("stream", GOOD | {"total": "10"}),
    "a fraction": wire.encode("stream", GOOD | {"total": 10.0}),
    "true": wire.encode("stream", GOOD | {"total": True}),
    "chunks of 1 byte": wire.encode("stream", GOOD | {"chunk": 1}),
    "a chunk at once": bytes(100_000),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_first_message_that_announces_nothing(case: str) -> None:
    with pytest.raises(InvalidRequest):
        read_opening(BAD_OPENINGS[case])
    with pytest.raises(DataLoss, match="the reply cannot be read"):
        StreamedAnswer(100).take(BAD_OPENINGS[case])


BROKEN: dict[str, tuple[list[bytes], type[ExpertMeshError]]] = {
    "a chunk of 0 bytes": ([b""], InvalidRequest),
    "one byte more": ([b"12345", b"678901"], DataLoss),
    "another chunk": ([b"1234567890", b"1"], DataLoss),
    "one byte less": ([b"12345", b"6789"], DataLoss),
    "no chunk": ([], DataLoss),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_length_that_was_not_announced(case: str) -> None:
    messages, kind = BROKEN[case]
    with pytest.raises(kind):
        feed(Assembly(10), messages)
    with pytest.raises(DataLoss):  # of a reply it is the server's doing
        feed(StreamedAnswer(100), [Opening(total=10).encode(), *messages])


def feed(assembly: Assembly | StreamedAnswer, messages: list[bytes]) -> memoryview:
    for message in messages:
        assembly.take(message)
    return assembly.finish()


def test_a_reply_that_never_began() -> None:
    with pytest.raises(DataLoss, match="no bytes"):
        StreamedAnswer(100).finish()


def test_a_reply_above_the_clients_limit_names_the_setting_before_memory_is_taken() -> None:
    with pytest.raises(TooLarge, match="has 101 bytes, but max_request_bytes of this client is 100"):
        StreamedAnswer(100).take(Opening(total=101).encode())


def test_memory_is_taken_when_bytes_come_not_when_they_are_announced() -> None:
    before = psutil.Process().memory_info().rss
    waiting = [Assembly(2**28) for _ in range(40)]
    assert psutil.Process().memory_info().rss - before < 40 * MIB
    assert len(waiting) == 40
