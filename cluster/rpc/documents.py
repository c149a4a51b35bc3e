"""JSON documents on the wire, such as the status of a cluster: one uint8 tensor `json` holds the UTF-8 text.

The text is not a header field, because the size of headers and their strings is limited.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ...experts.errors import DataLoss
from ...experts.protocol import MAX_INT
from ...experts.wire import Frame, WireTensor, encode, without_duplicates

NAME = "json"
MAX_DEPTH = 32


def encode_document(kind: str, document: dict[str, Any]) -> bytes:
    """Encode a document as a frame of kind `kind`."""
    return encode(kind, {}, {NAME: to_tensor(document)})


def to_tensor(document: Mapping[str, Any]) -> WireTensor:
    """Encode a document as a tensor. Raises ValueError or TypeError for values that JSON cannot represent."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    return WireTensor("uint8", (len(text),), text)


def decode_document(frame: Frame, kind: str) -> dict[str, Any]:
    """Decode the document in a frame of kind `kind`. Raises DataLoss for any other frame."""
    tensor = frame.tensors.get(NAME)
    if frame.kind != kind or tensor is None or tensor.dtype != "uint8":
        raise DataLoss(f"expected a {kind} frame with JSON text, not a {frame.kind[:64]!r} frame")
    try:
        document = json.loads(
            bytes(tensor.data), parse_constant=_no_constant, parse_int=_int64, object_pairs_hook=without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"the {kind} in the frame is not JSON: {type(error).__name__}") from None
    if not isinstance(document, dict):
        raise DataLoss(f"the {kind} in the frame is not a JSON object")
    if is_deep(document):
        raise DataLoss(f"the {kind} in the frame is nested deeper than {MAX_DEPTH}")
    return document


def is_deep(value: object) -> bool:
    """Whether maps and lists are nested deeper than documents may be; a recursion over what is not, ends."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for each in level for child in _children(each)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -MAX_INT <= (value := int(digits)) < MAX_INT:
        raise ValueError("a whole number of more than 64 bits")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
