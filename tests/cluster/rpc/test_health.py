"""The hand-written health messages: what protobuf would write, and nothing that crashes a reader."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.rpc import health
from expertmesh.cluster.rpc.health import ServingStatus
from expertmesh.experts.errors import InvalidRequest


@given(service=st.text(max_size=300))
@settings(max_examples=50, deadline=None)
def test_health_requests_come_back(service: str) -> None:
    assert health.decode_request(health.encode_request(service)) == service


@pytest.mark.parametrize("status", ServingStatus)
def test_health_responses_come_back(status: ServingStatus) -> None:
    assert health.decode_response(health.encode_response(status)) is status


@given(message=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_health_message_or_an_invalid_request(message: bytes) -> None:
    for decode in (health.decode_request, health.decode_response):
        with contextlib.suppress(InvalidRequest):
            decode(message)


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a\x05abc",
        b"\x0a",
        b"\x0a\xff",
        b"\x08\x01",
        b"\x0a\x01\xff",
        b"\x0b",
        b"\x0c",
        b"\x02\x00",
        b"\x80" * 11,
        b"\x12\x00" * 3000,
    ],
)
def test_malformed_health_requests_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequest):
        health.decode_request(message)


def test_unknown_fields_and_numbers_are_passed_over() -> None:
    assert health.decode_request(b"\x10\x05\x1a\x01z\x25abcd\x29abcdefgh\x0a\x02ab") == "ab"
    assert health.decode_response(b"\x08\x63") is ServingStatus.UNKNOWN
    assert health.decode_response(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01") is ServingStatus.UNKNOWN


def test_the_hand_encoding_is_that_of_protobuf() -> None:
    descriptors = pytest.importorskip("google.protobuf.descriptor_pb2")
    pool_module = pytest.importorskip("google.protobuf.descriptor_pool")
    factory = pytest.importorskip("google.protobuf.message_factory")
    file = descriptors.FileDescriptorProto(name="health_test.proto", package="health_test", syntax="proto3")
    for name, field, kind in (("Request", "service", 9), ("Response", "status", 5)):
        file.message_type.add(name=name).field.add(name=field, number=1, type=kind, label=1)
    pool = pool_module.DescriptorPool()
    pool.Add(file)
    request, response = (
        factory.GetMessageClass(pool.FindMessageTypeByName(f"health_test.{name}")) for name in ("Request", "Response")
    )
    for service in ("", "a", "ü" * 200):
        assert health.encode_request(service) == request(service=service).SerializeToString()
    for status in ServingStatus:
        assert health.encode_response(status) == response(status=int(status)).SerializeToString()
