"""The header of a safetensors file, read with limits, so that a hostile file cannot cause large allocations.

The library's own reader accepts headers of 100 MB. Parsed JSON takes up to 45 times the memory of its text; the limit
on the length of a header bounds that memory.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import DataLoss, SpecMismatch, TooLarge
from ..wire import without_duplicates

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
"""The torch dtypes of the supported safetensors dtypes."""

METADATA = "__metadata__"
LONGEST_NAME = 512
MOST_DIMS = 16
MOST_ELEMENTS = 2**48
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, dtype, shape, and its range of bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: BinaryIO, nbytes: int, *, max_bytes: int, max_tensors: int) -> tuple[Entry, ...]:
    """The tensors of a file of `nbytes` bytes, in the order of their bytes.

    They fill the file after the header without gap or overlap, each with the number of bytes of its shape and dtype.
    Raises DataLoss for a file that is truncated or malformed, TooLarge for a header above a limit, SpecMismatch for an
    unsupported dtype.
    """
    length = int.from_bytes(file.read(8), "little")
    if nbytes < 8 or length > nbytes - 8:
        raise DataLoss(
            f"the file has {nbytes} bytes, fewer than its header should have: it is truncated or not a safetensors "
            "file; write and send it again"
        )
    if length > max_bytes:
        raise TooLarge(
            f"the header has {length} bytes; the limit max_header_bytes is {max_bytes}: raise it or split the file"
        )
    raw = file.read(length)
    if len(raw) != length:
        raise DataLoss("the file shrank while it was read: send it again")
    tensors = _parsed(raw)
    if len(tensors) > max_tensors:
        raise TooLarge(
            f"the file has more than {max_tensors} tensors, the limit max_tensors: raise it or split the file"
        )
    entries = [_entry(name, described, 8 + length) for name, described in tensors.items()]
    return _placed(entries, 8 + length, nbytes)


def short(name: str) -> str:
    """Format a name from a file for a message: quoted, escaped and of bounded length."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _parsed(raw: bytes) -> dict[str, Any]:
    """The header's entries of tensors by name; metadata is checked and dropped."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it is not JSON as safetensors writes it, {error}") from None
    if not isinstance(header, dict):
        raise _malformed("it is not a map")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("its metadata is not a map of text to text")
    return header


def _entry(name: str, described: object, base: int) -> Entry:
    if len(name) > LONGEST_NAME or not _is_text(name):
        raise _malformed(f"the name {short(name)} is longer than {LONGEST_NAME} characters or not text")
    if not isinstance(described, dict) or described.keys() != ENTRY_KEYS:
        raise _malformed(f"{short(name)} must have dtype, shape and data_offsets, each once, and nothing else")
    shape, offsets, dtype = described["shape"], described["data_offsets"], described["dtype"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise _malformed(
            f"{short(name)} has a shape or data_offsets that are not lists of sizes, or a dtype that is not text"
        )
    if dtype not in DTYPES:
        raise SpecMismatch(f"{short(name)} has dtype {short(dtype)}; write it as one of {', '.join(DTYPES)}")
    if len(shape) > MOST_DIMS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise _malformed(f"{short(name)} has an impossible shape")
    start, stop = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _malformed(f"{short(name)} needs {needed} bytes, but its data_offsets span {stop - start}")
    return Entry(name, DTYPES[dtype], tuple(shape), base + start, base + stop)


def _placed(entries: list[Entry], start: int, nbytes: int) -> tuple[Entry, ...]:
    """Sort entries by the position of their bytes, which must fill the file."""
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    for entry in entries:
        if entry.start != start:
            raise _malformed(f"the bytes of {short(entry.name)} leave a gap after other tensors or overlap them")
        start = entry.stop
    if start != nbytes:
        problem = "is truncated" if start > nbytes else "has bytes that belong to no tensor"
        raise DataLoss(
            f"the file has {nbytes} bytes, but its tensors end at {start}: it {problem}; write and send it again"
        )
    return tuple(entries)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in name)  # lone surrogates, which JSON allows


def _malformed(problem: str) -> DataLoss:
    return DataLoss(f"the header is malformed: {problem}; write the file again with safetensors and send it again")
