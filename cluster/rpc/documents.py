"""JSON documents on the wire, such as the status of a cluster: one uint8 tensor `json` holds the UTF-8 text.

The text is not a header field, because the size of headers and their strings is limited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ...experts.errors import DataLoss
from ...experts.wire import Frame, WireTensor, encode, without_duplicates

NAME = "json"


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
        document = json.loads(bytes(tensor.data), parse_constant=_no_constant, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"the {kind} in the frame is not JSON: {type(error).__name__}") from None
    if not isinstance(document, dict):
        raise DataLoss(f"the {kind} in the frame is not a JSON object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
