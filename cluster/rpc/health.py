"""The messages of `grpc.health.v1.Health/Check`, encoded by hand: two fields, and no dependency on protobuf.

    HealthCheckRequest   string service = 1                 "" means the whole server
    HealthCheckResponse  ServingStatus status = 1           proto3 omits a field of value 0

Source: the gRPC health checking protocol, grpc/health/v1/health.proto; the protocol buffers wire format.
"""

from __future__ import annotations

from enum import IntEnum

from ...experts.errors import InvalidRequest

SERVICE = "grpc.health.v1.Health"
CHECK = f"/{SERVICE}/Check"
MAX_MESSAGE_BYTES = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


class ServingStatus(IntEnum):
    """The health of a service."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


def encode_request(service: str) -> bytes:
    """Encode a HealthCheckRequest."""
    name = service.encode()
    return bytes([1 << 3 | _BYTES]) + _encode_varint(len(name)) + name if name else b""


def decode_request(message: bytes) -> str:
    """Decode a HealthCheckRequest to its service. Raises InvalidRequest if it is malformed."""
    service = b""
    for number, wire_type, value in _fields(message):
        if number == 1:
            if wire_type != _BYTES or not isinstance(value, bytes):
                raise InvalidRequest("service in a health request must be text")
            service = value
    try:
        return service.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("service in a health request must be UTF-8") from None


def encode_response(status: ServingStatus) -> bytes:
    """Encode a HealthCheckResponse."""
    return bytes([1 << 3 | _VARINT, status]) if status else b""


def decode_response(message: bytes) -> ServingStatus:
    """Decode a HealthCheckResponse to its status; unknown numbers become UNKNOWN. Raises InvalidRequest."""
    status = 0
    for number, wire_type, value in _fields(message):
        if number == 1:
            if wire_type != _VARINT or not isinstance(value, int):
                raise InvalidRequest("status in a health response must be a number")
            status = value
    return ServingStatus(status) if status in ServingStatus._value2member_map_ else ServingStatus.UNKNOWN


def _fields(message: bytes) -> list[tuple[int, int, int | bytes]]:
    """All fields of a message as (number, wire type, value); a fixed-size value is returned as bytes."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"a health message may have at most {MAX_MESSAGE_BYTES} bytes, not {len(message)}")
    fields: list[tuple[int, int, int | bytes]] = []
    offset = 0
    while offset < len(message):
        tag, offset = _decode_varint(message, offset)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == _VARINT:
            value, offset = _decode_varint(message, offset)
        elif wire_type == _BYTES or wire_type in _FIXED_SIZES:
            size, offset = (_FIXED_SIZES[wire_type], offset) if wire_type != _BYTES else _decode_varint(message, offset)
            if offset + size > len(message):
                raise InvalidRequest("a health message ends inside a field")
            value, offset = message[offset : offset + size], offset + size
        else:
            raise InvalidRequest(f"a health message holds wire type {wire_type}, which is not supported")
        if number == 0:
            raise InvalidRequest("a health message holds a field without a number")
        fields.append((number, wire_type, value))
    return fields


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _decode_varint(message: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            raise InvalidRequest("a health message ends inside a number")
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise InvalidRequest("a health message holds a number of more than 64 bits")
