"""Reads the records and documents of requests out of their frames."""

from __future__ import annotations

from typing import Any, TypeVar

from ...experts.errors import DataLoss, InvalidRequest, TooLarge
from ...experts.protocol import from_mapping
from ...experts.wire import Frame
from ..rpc.documents import NAME, decode_document

MAX_DOCUMENT_BYTES = 2**20
T = TypeVar("T")


def record_of(kind: type[T], frame: Frame, name: str, tensors: tuple[str, ...] = ()) -> T:
    """Read the record in a frame's header. Raises InvalidRequest for a frame of another kind, or with other tensors."""
    if frame.kind != name or frame.tensors.keys() != set(tensors):
        expected = f"the tensors {', '.join(tensors)}" if tensors else "no tensors"
        raise InvalidRequest(f"expected a frame of kind {name!r} with {expected}")
    return from_mapping(kind, frame.meta)


def document_of(frame: Frame, kind: str) -> dict[str, Any]:
    """Read the JSON document of a frame. Raises InvalidRequest or TooLarge."""
    if frame.meta or frame.tensors.keys() != {NAME}:
        raise InvalidRequest(f"a {kind} must be a JSON document in the tensor `{NAME}`, and nothing else")
    if frame.tensors[NAME].nbytes > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"a {kind} document may have at most {MAX_DOCUMENT_BYTES} bytes: change fewer ids at a time")
    try:
        return decode_document(frame, kind)
    except DataLoss as error:
        raise InvalidRequest(error.message) from None
