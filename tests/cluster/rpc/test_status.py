"""Errors as gRPC status and back: the table is whole, ours come back as themselves, no name is believed blindly."""

from __future__ import annotations

import grpc
import pytest

from expertmesh.cluster.rpc.status import BY_CODE, MAX_TEXT_BYTES, from_status, to_status
from expertmesh.experts.errors import (
    BY_NAME,
    Aborted,
    ExpertMeshError,
    NotFound,
    Overloaded,
    RouterUnavailable,
    TooLarge,
)


def test_the_table_covers_every_status_of_grpc() -> None:
    assert set(BY_CODE) == set(grpc.StatusCode.__members__) - {"OK"}


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_a_status_of_grpcs_own_becomes_the_error_of_the_table(code: str) -> None:
    error = from_status(code, "details", ())
    assert type(error) is BY_CODE[code][0]
    assert str(error).endswith(": details")
    assert from_status(code, "", ()).message == BY_CODE[code][1]
    assert error.code == code or code in ("CANCELLED", "UNKNOWN", "ALREADY_EXISTS", "OUT_OF_RANGE", "UNIMPLEMENTED")


@pytest.mark.parametrize("kind", BY_NAME.values(), ids=BY_NAME)
def test_every_error_of_ours_comes_back_as_itself(kind: type[ExpertMeshError]) -> None:
    error = from_status(*to_status(kind("what and where", request_id="r7")))
    assert type(error) is kind
    assert (str(error), error.request_id) == ("what and where", "r7")


def test_retry_after_comes_back() -> None:
    code, text, metadata = to_status(Overloaded("full", retry_after=0.25))
    assert ("retry-after-ms", "250") in metadata
    error = from_status(code, text, metadata)
    assert isinstance(error, Overloaded)
    assert error.retry_after == 0.25


@pytest.mark.parametrize(
    ("text", "seconds"), [("-5", 0.1), ("x", 0.1), ("", 0.1), ("²", 0.1), ("9" * 9, 600.0), ("9" * 99, 0.1)]
)
def test_a_senseless_retry_after_does_no_harm(text: str, seconds: float) -> None:
    error = from_status("RESOURCE_EXHAUSTED", "full", [("expertmesh-error", "Overloaded"), ("retry-after-ms", text)])
    assert isinstance(error, Overloaded)
    assert error.retry_after == seconds


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "Aborted", "", "__class__"])
def test_a_class_that_is_unknown_or_of_another_code_is_not_believed(name: str) -> None:
    assert type(from_status("NOT_FOUND", "gone", [("expertmesh-error", name)])) is NotFound
    assert type(from_status("NO_SUCH_CODE", "gone", [("expertmesh-error", name)])) is ExpertMeshError


def test_binary_metadata_is_passed_over() -> None:
    metadata: list[tuple[str, str | bytes]] = [("expertmesh-error", b"NotFound"), ("x-request-id", "r")]
    assert from_status("ABORTED", "lost", metadata).request_id == "r"
    assert type(from_status("ABORTED", "lost", metadata)) is Aborted


def test_grpcs_own_size_limit_is_too_large_with_the_settings_name() -> None:
    error = from_status("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 4)", ())
    assert type(error) is TooLarge
    assert "max_message_bytes" in str(error)


def test_a_stream_that_grpc_lost_during_a_write_is_unavailable() -> None:
    assert type(from_status("INTERNAL", "Internal error from Core", ())) is RouterUnavailable
    assert type(from_status("INTERNAL", "something else", ())) is ExpertMeshError


def test_texts_are_cut() -> None:
    for letter in ("x", "ü", "\U0001f600", "\ud800"):
        assert 0 < len(to_status(NotFound(letter * 100_000))[1].encode()) <= MAX_TEXT_BYTES
    assert len(str(from_status("NOT_FOUND", "x" * 100_000, ()))) < 2 * MAX_TEXT_BYTES


@pytest.mark.parametrize("request_id", ["", "two words", "line\nbreak", "ü", "x" * 129])
def test_a_request_id_that_metadata_cannot_hold_is_left_out(request_id: str) -> None:
    assert to_status(NotFound("gone", request_id=request_id))[2] == (("expertmesh-error", "NotFound"),)
