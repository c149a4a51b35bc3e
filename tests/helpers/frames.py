"""Frames that are wrong in every way, and what must be said of each; shared by the tests of decoder and gateway."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import msgpack
import numpy as np

from expertmesh.experts import wire
from expertmesh.experts.errors import DataLoss, ExpertMeshError, InvalidRequest, TooLarge


def frame_of(header: object, body: bytes = b"", *, packed: bytes | None = None, **prefix: Any) -> bytes:
    """A frame with any header at all: an object to pack, or bytes that claim to be packed."""
    data = msgpack.packb(header) if packed is None else packed
    fields = {"magic": b"XMSH", "version": 1, "reserved": 0, "length": len(data)} | prefix
    head = struct.pack("<4sHHI", *fields.values()) + data
    return head + bytes(-len(head) % 64) + body


def header_of(*tensors: object, meta: object = None, kind: object = "call") -> dict[str, object]:
    return {"kind": kind, "meta": {} if meta is None else meta, "tensors": list(tensors)}


VALID = wire.encode(
    "call",
    {"layer": "news", "top_k": 2, "deny": ["news/e0", "news/e1"], "nested": {"a": 1.5}},
    {
        "x": wire.WireTensor.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "mask": wire.WireTensor.from_numpy(np.array([True, False, True])),
        "empty": wire.WireTensor.from_numpy(np.zeros((0, 7), np.int64)),
    },
)


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


def packed_map(*pairs: tuple[bytes, bytes]) -> bytes:
    return bytes([0x80 | len(pairs)]) + b"".join(key + value for key, value in pairs)


KIND = (msgpack.packb("kind"), msgpack.packb("k"))
META = (msgpack.packb("meta"), msgpack.packb({}))
TENSORS = (msgpack.packb("tensors"), msgpack.packb([]))


def meta_bytes(value: bytes) -> bytes:
    """A whole header whose meta is {"a": <these bytes>}."""
    return packed_map(KIND, (msgpack.packb("meta"), packed_map((msgpack.packb("a"), value))), TENSORS)


REFUSED: dict[str, tuple[bytes, type[ExpertMeshError]]] = {
    "nothing": (b"", InvalidRequest),
    "shorter than the prefix": (VALID[:11], InvalidRequest),
    "wrong magic": (frame_of(header_of(), magic=b"XMSI"), InvalidRequest),
    "wrong version": (frame_of(header_of(), version=2), InvalidRequest),
    "reserved set": (frame_of(header_of(), reserved=1), InvalidRequest),
    "header length beyond the limit": (frame_of(header_of(), length=64 * 1024 + 1), TooLarge),
    "header length of 4 GiB": (frame_of(header_of(), length=2**32 - 1), TooLarge),
    "header length beyond the frame": (frame_of(header_of(), length=1000), DataLoss),
    "header length short": (frame_of(header_of(), length=3), InvalidRequest),
    "header empty": (frame_of(None, packed=b""), InvalidRequest),
    "no padding": (frame_of(header_of())[:-1], DataLoss),
    "header is a list": (frame_of([1, 2]), InvalidRequest),
    "header is a number": (frame_of(1), InvalidRequest),
    "a key is missing": (frame_of({"kind": "k", "meta": {}}), InvalidRequest),
    "a key too many": (frame_of(header_of() | {"more": 1}), InvalidRequest),
    "kind is a number": (frame_of(header_of(kind=1)), InvalidRequest),
    "meta is a list": (frame_of(header_of(meta=[])), InvalidRequest),
    "tensors is a map": (frame_of({"kind": "k", "meta": {}, "tensors": {}}), InvalidRequest),
    "two headers": (frame_of(None, packed=msgpack.packb(header_of()) * 2), InvalidRequest),
    "duplicate key": (frame_of(None, packed=packed_map(KIND, KIND, META, TENSORS)), InvalidRequest),
    "number as a key": (frame_of(header_of(meta={1: 2})), InvalidRequest),
    "bytes as a key": (frame_of(None, packed=packed_map((b"\xc4\x01a", b"\x01"))), InvalidRequest),
    "nested key twice": (
        frame_of(None, packed=meta_bytes(packed_map((b"\xa1b", b"\x01"), (b"\xa1b", b"\x02")))),
        InvalidRequest,
    ),
    "nested too deep": (frame_of(header_of(meta={"a": deep(3)})), InvalidRequest),
    "nested 60,000 deep": (frame_of(None, packed=b"\x91" * 60_000 + b"\x01"), InvalidRequest),
    "binary": (frame_of(None, packed=meta_bytes(b"\xc4\x02ab")), InvalidRequest),
    "empty binary": (frame_of(None, packed=meta_bytes(b"\xc4\x00")), InvalidRequest),
    "binary of 4 GiB": (frame_of(None, packed=meta_bytes(b"\xc6\xff\xff\xff\xff")), InvalidRequest),
    "extension type": (frame_of(None, packed=meta_bytes(b"\xd4\x05a")), InvalidRequest),
    "empty extension type": (frame_of(None, packed=meta_bytes(b"\xc7\x00\x05")), InvalidRequest),
    "timestamp": (frame_of(None, packed=meta_bytes(b"\xd6\xff\x00\x00\x00\x01")), InvalidRequest),
    "empty timestamp": (frame_of(None, packed=meta_bytes(b"\xc7\x00\xff")), InvalidRequest),
    "reserved type byte": (frame_of(None, packed=meta_bytes(b"\xc1")), InvalidRequest),
    "text too long": (frame_of(header_of(meta={"a": "x" * 4097})), InvalidRequest),
    "text of 4 GiB": (frame_of(None, packed=meta_bytes(b"\xdb\xff\xff\xff\xff")), InvalidRequest),
    "text that is not UTF-8": (frame_of(None, packed=meta_bytes(b"\xa1\xff")), InvalidRequest),
    "list too long": (frame_of(header_of(meta={"a": [0] * 4097})), InvalidRequest),
    "list of 4 billion": (frame_of(None, packed=meta_bytes(b"\xdd\xff\xff\xff\xff")), InvalidRequest),
    "map of 4 billion": (frame_of(None, packed=meta_bytes(b"\xdf\xff\xff\xff\xff")), InvalidRequest),
    "header ends early": (frame_of(None, packed=msgpack.packb(header_of())[:-1]), InvalidRequest),
    "a tensor too many": (frame_of(header_of(*[[str(n), "int8", [0]] for n in range(17)])), InvalidRequest),
    "tensor named twice": (frame_of(header_of(["x", "int8", [0]], ["x", "int8", [0]])), InvalidRequest),
    "tensor of two fields": (frame_of(header_of(["x", "int8"])), InvalidRequest),
    "tensor is a map": (frame_of(header_of({"name": "x"})), InvalidRequest),
    "tensor name is a number": (frame_of(header_of([1, "int8", [0]])), InvalidRequest),
    "dims are a number": (frame_of(header_of(["x", "int8", 0])), InvalidRequest),
    "dims are text": (frame_of(header_of(["x", "int8", "12"])), InvalidRequest),
    "unknown dtype": (frame_of(header_of(["x", "complex128", [0]])), InvalidRequest),
    "dtype object": (frame_of(header_of(["x", "object", [0]])), InvalidRequest),
    "dtype is a list": (frame_of(header_of(["x", ["int8"], [0]])), InvalidRequest),
    "negative dim": (frame_of(header_of(["x", "int8", [-1]])), InvalidRequest),
    "two negative dims": (frame_of(header_of(["x", "int8", [-8, -8]]), bytes(64)), InvalidRequest),
    "dim is a float": (frame_of(header_of(["x", "int8", [1.0]])), InvalidRequest),
    "dim is a bool": (frame_of(header_of(["x", "int8", [True]])), InvalidRequest),
    "nine dims": (frame_of(header_of(["x", "int8", [1] * 9]), bytes(64)), InvalidRequest),
    "huge dim": (frame_of(header_of(["x", "int8", [2**63]])), TooLarge),
    "dims whose product wraps to 0": (frame_of(header_of(["x", "int8", [2**32, 2**32]])), TooLarge),
    "huge dim beside 0": (frame_of(header_of(["x", "int8", [0, 2**62]])), TooLarge),
    "dims that only numpy refuses": (frame_of(header_of(["x", "float64", [0, *[2**30] * 7]])), TooLarge),
    "bytes missing": (frame_of(header_of(["x", "float32", [16]])), DataLoss),
    "one byte missing": (VALID[:-1], DataLoss),
    "one byte more": (VALID + b"\0", DataLoss),
    "64 bytes more": (VALID + bytes(64), DataLoss),
    "bool byte of 2": (frame_of(header_of(["x", "bool", [2]]), b"\x01\x02" + bytes(62)), InvalidRequest),
    "bool byte of 255": (frame_of(header_of(["x", "bool", [2]]), b"\xff\x00" + bytes(62)), InvalidRequest),
}

BOMBS = {
    "5 MB of empty lists": frame_of(None, packed=b"\xdd" + struct.pack(">I", 5_000_000) + b"\x90" * 5_000_000),
    "64 KiB of empty lists": frame_of(None, packed=b"\xdc\xff\xf0" + b"\x90" * 65_000),
    "lists of full lists of empty lists": frame_of(None, packed=b"\x9f" + (b"\xdc\x0f\xff" + b"\x90" * 4095) * 15),
    "64 KiB of empty maps": frame_of(None, packed=b"\x9f" + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 15),
    "64 KiB of lists in lists": frame_of(None, packed=b"\x91" * 65_000),
    "lists that promise much": frame_of(None, packed=b"\xdc\x10\x00" * 20_000),
    "maps that promise much": frame_of(None, packed=(b"\xde\x10\x00" + b"\xa1a") * 13_000),
    "a tensor of 1 TiB": frame_of(header_of(["x", "int8", [2**40]])),
    "16 tensors of 1 TiB": frame_of(header_of(*[[str(n), "float64", [2**37]] for n in range(16)])),
}


def mutate(frame: bytes, chance: random.Random) -> bytes:
    """A frame with a few bytes changed, cut out, doubled or added, mostly near its header."""
    data = bytearray(frame)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = (
            min(int(chance.expovariate(1 / 60)), len(data) - 1)
            if chance.random() < 0.8
            else chance.randrange(len(data))
        )
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + math.ceil(chance.expovariate(0.3))]
            case 3:
                data[at:at] = chance.randbytes(math.ceil(chance.expovariate(0.3)))
            case 4:
                data[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff"))
        if not data:
            break
    return bytes(data)
