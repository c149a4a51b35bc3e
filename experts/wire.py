"""The frame format: a msgpack header and raw tensor bytes, fully validated before use.

    offset 0   magic b"XMSH"
           4   protocol version, u16 little endian
           6   reserved, u16, zero
           8   header length in bytes, u32 little endian (at most 64 KiB)
          12   header: msgpack map {"kind": str, "meta": map, "tensors": [[name, dtype, [dims...]], ...]}
               zero padding to a multiple of 64, then each tensor's bytes in C order, each padded to a multiple of 64

The offset of a tensor is computed from the header, so a frame contains no offset that could be wrong. Decoding copies
no tensor: the views are read-only and share the frame's memory. Pickle and msgpack extension types are never decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from .errors import DataLoss, InvalidRequest, TooLarge

MAGIC = b"XMSH"
PROTOCOL_VERSION = 1
ALIGNMENT = 64
MAX_HEADER_BYTES = 64 * 1024
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_TENSORS = 16
MAX_DIMS = 8
MAX_ITEMS = 4096
MAX_TEXT_BYTES = 4096
MAX_DEPTH = 4
MAX_ELEMENT_BYTES = 1 << 40
_PREFIX = struct.Struct("<4sHHI")
_SCALARS = frozenset({str, int, float, bool, type(None)})
Buffer = bytes | memoryview

ITEM_SIZES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""The wire dtypes and their sizes in bytes. Byte order is little endian."""


@dataclass(frozen=True)
class WireTensor:
    """A tensor on the wire: dtype name, shape, and its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview | bytes

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any], dtype: str | None = None) -> WireTensor:
        """View an array, copied only if not contiguous; `dtype` declares uint16 bits as bfloat16."""
        name = dtype or array.dtype.name
        if name not in ITEM_SIZES:
            raise InvalidRequest(f"dtype {name} cannot be sent; use one of {', '.join(ITEM_SIZES)}")
        if dtype is not None and array.dtype.itemsize != ITEM_SIZES[name]:
            raise InvalidRequest(
                f"an array of {array.dtype.name} cannot hold {name} bits: pass {ITEM_SIZES[name]} bytes per element"
            )
        contiguous = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        return cls(name, tuple(array.shape), contiguous.reshape(-1).view(np.uint8).data)

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """View the bytes as an array; bfloat16, which numpy lacks, is returned as uint16 bits."""
        numpy_dtype = np.uint16 if self.dtype == "bfloat16" else np.dtype(self.dtype)
        return np.frombuffer(self.data, dtype=numpy_dtype).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return len(self.data)


@dataclass(frozen=True)
class Frame:
    """One decoded message: its kind, its options, and its named tensors."""

    kind: str
    meta: dict[str, Any]
    tensors: dict[str, WireTensor]


def bfloat16_to_float32(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Widen bfloat16 bits (uint16) to float32, exactly."""
    widened = bits.astype(np.uint32)
    widened <<= np.uint32(16)
    return widened.view(np.float32)


def encode_parts(kind: str, meta: Mapping[str, Any], tensors: Mapping[str, WireTensor]) -> list[Buffer]:
    """Encode a message as a list of buffers for a vectored write; no tensor is copied."""
    return encode_scattered(kind, meta, {name: (t.dtype, t.shape, (t.data,)) for name, t in tensors.items()})


def encode_scattered(
    kind: str, meta: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], Sequence[Buffer]]]
) -> list[Buffer]:
    """Like `encode_parts`, for tensors (dtype, shape, pieces) whose bytes are the concatenation of several pieces."""
    described = [[name, dtype, list(shape)] for name, (dtype, shape, _) in tensors.items()]
    try:
        header = msgpack.packb({"kind": kind, "meta": dict(meta), "tensors": described}, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"the message has a value that cannot be sent: {error}") from None
    if len(header) > MAX_HEADER_BYTES:
        raise TooLarge(f"the message's header has {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    head = _PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, len(header)) + header
    parts: list[Buffer] = [head + bytes(-len(head) % ALIGNMENT)]
    for _, _, pieces in tensors.values():
        parts += pieces
        padding = -sum(map(len, pieces)) % ALIGNMENT
        if padding:
            parts.append(bytes(padding))
    return parts


def encode(kind: str, meta: Mapping[str, Any], tensors: Mapping[str, WireTensor] | None = None) -> bytes:
    """Encode a message as one byte string.

    Raises TooLarge if the header exceeds 64 KiB, and InvalidRequest for values that msgpack cannot encode.
    """
    return b"".join(encode_parts(kind, meta, tensors or {}))


def decode(frame: Buffer, *, max_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """Decode and validate one frame.

    Raises InvalidRequest for a malformed frame, DataLoss for a frame whose length does not match its header, and
    TooLarge above `max_bytes`.
    """
    view = memoryview(frame)
    if len(view) > max_bytes:
        raise TooLarge(f"the frame has {len(view)} bytes; the limit (max_message_bytes) is {max_bytes}")
    header, offset = _read_header(view)
    kind, meta, described = header["kind"], header["meta"], header["tensors"]
    tensors: dict[str, WireTensor] = {}
    for name, dtype, shape in _check_tensors(described):
        if name in tensors:
            raise InvalidRequest(f"tensor {name!r} appears twice in the frame")
        size = _tensor_bytes(name, dtype, shape)
        if offset + size > len(view):
            raise DataLoss(f"the frame ends before tensor {name!r} does: {size} bytes expected at {offset}")
        tensors[name] = WireTensor(dtype, shape, view[offset : offset + size].toreadonly())
        _check_bool(name, tensors[name])
        offset += size + (-size % ALIGNMENT)
    if offset != len(view):
        raise DataLoss(f"the frame has {len(view)} bytes, but its header describes {offset}")
    return Frame(kind, meta, tensors)


def _read_header(view: memoryview) -> tuple[dict[str, Any], int]:
    if len(view) < _PREFIX.size:
        raise InvalidRequest(f"a frame has at least {_PREFIX.size} bytes; this one has {len(view)}")
    magic, version, reserved, length = _PREFIX.unpack_from(view)
    if magic != MAGIC or reserved != 0:
        raise InvalidRequest("not an expertmesh frame: the magic bytes are wrong")
    if version != PROTOCOL_VERSION:
        raise InvalidRequest(f"protocol version {version} is not supported; only {PROTOCOL_VERSION} is")
    if length > MAX_HEADER_BYTES:
        raise TooLarge(f"the header has {length} bytes; the limit is {MAX_HEADER_BYTES}")
    end = _PREFIX.size + length
    if end > len(view):
        raise DataLoss("the frame ends inside its header")
    header = _unpack(view[_PREFIX.size : end])
    expected = {"kind": str, "meta": dict, "tensors": list}
    if not isinstance(header, dict) or set(header) != set(expected):
        raise InvalidRequest("the header must hold exactly kind, meta and tensors")
    for key, kind in expected.items():
        if not isinstance(header[key], kind):
            raise InvalidRequest(f"{key} in the header must be a {kind.__name__}")
    return header, end + (-end % ALIGNMENT)


def _unpack(data: memoryview) -> object:
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=without_duplicates,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=0,
            max_ext_len=0,
        )
    except InvalidRequest:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException) as error:
        raise InvalidRequest(f"the header is not valid msgpack of this protocol: {type(error).__name__}") from None
    _check_values(value, MAX_DEPTH)
    return value


def without_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A map with text keys, for a decoder of msgpack or JSON. Raises InvalidRequest for a key that appears twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise InvalidRequest("keys in the header must be text")
        if key in result:
            raise InvalidRequest(f"key {key[:64]!r} appears twice")
        result[key] = value
    return result


def _check_values(value: object, left: int) -> None:
    if type(value) not in (dict, list):
        if type(value) not in _SCALARS:
            raise InvalidRequest(
                f"the header holds a {type(value).__name__}; only text, numbers, maps and lists are allowed"
            )
        return
    if left == 0:
        raise InvalidRequest(f"the header is nested deeper than {MAX_DEPTH}")
    for child in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
        if type(child) not in _SCALARS:  # most are scalars: a call for each would cost more than the rest of decoding
            _check_values(child, left - 1)


def _check_tensors(described: list[Any]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    if len(described) > MAX_TENSORS:
        raise InvalidRequest(f"a frame carries at most {MAX_TENSORS} tensors; this one has {len(described)}")
    for entry in described:
        if not (isinstance(entry, list) and len(entry) == 3):
            raise InvalidRequest("a tensor is described by [name, dtype, [dims...]]")
        name, dtype, dims = entry
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(dims, list)):
            raise InvalidRequest("a tensor is described by [name, dtype, [dims...]]")
        if dtype not in ITEM_SIZES:
            raise InvalidRequest(f"tensor {name[:64]!r} has dtype {dtype[:64]!r}; use one of {', '.join(ITEM_SIZES)}")
        if len(dims) > MAX_DIMS or any(type(dim) is not int or dim < 0 for dim in dims):
            raise InvalidRequest(f"tensor {name[:64]!r} must have at most {MAX_DIMS} dimensions, each 0 or more")
        yield name, dtype, tuple(dims)


def _tensor_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    size = extent = ITEM_SIZES[dtype]
    for dim in shape:
        size *= dim
        extent *= max(dim, 1)
    if extent > MAX_ELEMENT_BYTES:
        raise TooLarge(f"tensor {name[:64]!r} of shape {list(shape)} is larger than any limit")
    return size


def _check_bool(name: str, tensor: WireTensor) -> None:
    if tensor.dtype == "bool" and tensor.nbytes and int(np.frombuffer(tensor.data, np.uint8).max()) > 1:
        raise InvalidRequest(f"tensor {name[:64]!r} is bool but holds bytes other than 0 and 1")
