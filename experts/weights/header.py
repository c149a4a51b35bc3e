"""The header of a safetensors file, read under limits: a hostile one is refused before anything large is allocated.

The library's own reader takes headers of 100 MB. This one looks at one entry after the other, so that its memory is
bounded by the length of the header and the number of entries, whatever their text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import DataLoss, SpecMismatch, TooLarge

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
"""The torch dtype of each dtype that a file may name."""

METADATA = "__metadata__"
LONGEST_NAME = 512
LONGEST_ENTRY = 1024
MOST_DIMS = 16
MOST_METADATA = 1000
MOST_ELEMENTS = 2**48
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, what it is, and where its bytes lie, in bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: BinaryIO, nbytes: int, *, max_bytes: int, max_tensors: int) -> tuple[Entry, ...]:
    """The tensors of a file of `nbytes` bytes, in the order in which their bytes lie.

    They are known to fill the file behind the header without gap or overlap, each with as many bytes as its shape
    needs. Raises DataLoss for a file that is truncated or malformed, TooLarge for a header above a limit, SpecMismatch
    for a dtype that no expert here can have.
    """
    length = int.from_bytes(file.read(8), "little")
    if nbytes < 8 or length > nbytes - 8:
        raise DataLoss(
            f"the file has {nbytes} bytes, too few for the header that it announces: it is truncated or no safetensors "
            "file; write and send it again"
        )
    if length > max_bytes:
        raise TooLarge(f"the header has {length} bytes, the limit max_header_bytes is {max_bytes}: raise it or split")
    raw = file.read(length)
    if len(raw) != length:
        raise DataLoss("the file became shorter while it was read: send it again")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    del raw
    entries: list[Entry] = []
    for name, value in _descriptions(text):
        if len(entries) >= max_tensors:
            raise TooLarge(f"the file names more than {max_tensors} tensors, the limit max_tensors: raise it or split")
        entries.append(_entry(name, value, 8 + length))
    return _placed(entries, 8 + length, nbytes)


def short(name: str) -> str:
    """A name from a file as it may stand in a message: quoted, escaped and of bounded length."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _descriptions(text: str) -> Iterator[tuple[str, str]]:
    """(name, text of the description) of each tensor; metadata is checked and left out."""
    cursor, names = _Cursor(text), set[str]()
    for name in cursor.members():
        if name in names:
            raise _malformed(f"it names {short(name)} twice")
        names.add(name)
        if name == METADATA:
            for count, _ in enumerate(cursor.members(), 1):
                cursor.string()
                if count > MOST_METADATA:
                    raise _malformed(f"it has more than {MOST_METADATA} entries of metadata")
            continue
        if len(name) > LONGEST_NAME or not _is_text(name):
            raise _malformed(f"the name {short(name)} is longer than {LONGEST_NAME} characters or not text")
        yield name, cursor.description()
    cursor.end()


class _Cursor:
    """A place in the text of a header; it steps over one sign, string or flat map at a time and never nests."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """Each key of the map that comes next; whoever asks steps over the values."""
        self._sign("{")
        if self._text.startswith("}", self._blank()):
            self._sign("}")
            return
        while True:
            name = self.string()
            self._sign(":")
            yield name
            if self._sign(",}") == "}":
                return

    def string(self) -> str:
        """The string that comes next."""
        self._sign('"')
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at - 1)
        except ValueError:
            raise _malformed(f"a string is not closed or not JSON at character {self._at - 1}") from None
        return str(value)

    def description(self) -> str:
        """The text of the map that comes next, which must be short and flat: nothing else is ever parsed."""
        self._sign("{")
        start = self._at - 1
        self._at = self._text.find("}", start, start + LONGEST_ENTRY) + 1
        value = self._text[start : self._at]
        if value.count("[") != 2 or value.count("{") != 1:
            raise _malformed("a tensor is described otherwise than by dtype, shape and data_offsets")
        return value

    def end(self) -> None:
        """Only blanks may come."""
        if self._blank() != len(self._text):
            raise _malformed("there is more text behind its end")

    def _sign(self, signs: str) -> str:
        at = self._blank()
        if at == len(self._text) or self._text[at] not in signs:
            raise _malformed(f"{' or '.join(signs)} is missing at character {at}")
        self._at = at + 1
        return self._text[at]

    def _blank(self) -> int:
        found = _SPACE.match(self._text, self._at)
        return found.end() if found else self._at


def _entry(name: str, text: str, base: int) -> Entry:
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
    except ValueError:
        raise _malformed(f"the description of {short(name)} is not JSON") from None
    found = dict(pairs)
    if len(pairs) != 3 or found.keys() != ENTRY_KEYS:
        raise _malformed(f"{short(name)} must have dtype, shape and data_offsets, each once, and nothing else")
    shape, offsets, dtype = found["shape"], found["data_offsets"], found["dtype"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise _malformed(f"{short(name)} has a shape or data_offsets that are not lists of sizes, or an odd dtype")
    if dtype not in DTYPES:
        raise SpecMismatch(f"{short(name)} has dtype {short(dtype)}; write it as one of {', '.join(DTYPES)}")
    if len(shape) > MOST_DIMS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise _malformed(f"{short(name)} has an impossible shape")
    start, stop = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _malformed(f"{short(name)} needs {needed} bytes and its data_offsets do not span so many")
    return Entry(name, DTYPES[dtype], tuple(shape), base + start, base + stop)


def _placed(entries: list[Entry], start: int, nbytes: int) -> tuple[Entry, ...]:
    """Entries in the order of their bytes, which must fill the file."""
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    for entry in entries:
        if entry.start != start:
            raise _malformed(f"the bytes of {short(entry.name)} leave a gap behind other tensors or overlap them")
        start = entry.stop
    if start != nbytes:
        problem = "is truncated" if start > nbytes else "has bytes that belong to no tensor"
        raise DataLoss(
            f"the file has {nbytes} bytes, its tensors end at {start}: it {problem}; write and send it again"
        )
    return tuple(entries)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in name)  # halves of a pair, which JSON lets through


def _malformed(problem: str) -> DataLoss:
    return DataLoss(f"the header is malformed: {problem}; write the file anew with safetensors and send it again")
