"""Converts errors to gRPC status and back: a code, a short text, and trailing metadata that names the class.

No gRPC here: codes are names, so that client, server and tests share one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...experts.errors import (
    BY_NAME,
    Aborted,
    DataLoss,
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    RouterUnavailable,
    TooLarge,
    Unauthenticated,
)

_TOO_LARGE = (
    "the message exceeds max_message_bytes of this client or of the server: call with stream=True, send fewer rows per "
    "call, or raise it on both the client and the cluster"
)

_CUT_OFF = "Internal error from Core"  # gRPC's asyncio error for a stream that ends during a write

ERROR_KEY = "expertmesh-error"
REQUEST_ID_KEY = "x-request-id"
LAYER_KEY = "x-expertmesh-layer"
RETRY_AFTER_KEY = "retry-after-ms"
MAX_TEXT_BYTES = 1000
MAX_RETRY_AFTER_MS = 600_000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")

Metadata = Iterable[tuple[str, "str | bytes"]]

BY_CODE: dict[str, tuple[type[ExpertMeshError], str]] = {
    "CANCELLED": (RouterUnavailable, "the call was cut off"),
    "UNKNOWN": (ExpertMeshError, "the server failed without saying why"),
    "INVALID_ARGUMENT": (InvalidRequest, "the request was refused"),
    "DEADLINE_EXCEEDED": (DeadlineExceeded, "no answer before the deadline"),
    "NOT_FOUND": (NotFound, "not found"),
    "ALREADY_EXISTS": (FailedPrecondition, "it already exists"),
    "PERMISSION_DENIED": (PermissionDenied, "refused"),
    "UNAUTHENTICATED": (Unauthenticated, "refused"),
    "RESOURCE_EXHAUSTED": (Overloaded, "the server is out of resources"),
    "FAILED_PRECONDITION": (FailedPrecondition, "refused"),
    "ABORTED": (Aborted, "a concurrent change came first"),
    "OUT_OF_RANGE": (InvalidRequest, "the request was refused"),
    "UNIMPLEMENTED": (FailedPrecondition, "the server does not know this method: is it an expertmesh of this version?"),
    "INTERNAL": (ExpertMeshError, "the connection or the server failed"),
    "UNAVAILABLE": (RouterUnavailable, "the server cannot be reached"),
    "DATA_LOSS": (DataLoss, "data was lost or damaged"),
}
"""The error for a status without an error class, which gRPC itself or a proxy created: every code but OK."""


def is_request_id(value: object) -> bool:
    """Whether a value is a valid request id: 1 to 128 characters that are safe in metadata and in logs."""
    return isinstance(value, str) and _REQUEST_ID.fullmatch(value) is not None


def to_status(error: ExpertMeshError) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """The status code, text and trailing metadata of an error.

    The text is truncated, because gRPC refuses trailers of 8 KiB. An invalid request id is left out.
    """
    metadata = [(ERROR_KEY, type(error).__name__)]
    if error.request_id is not None and is_request_id(error.request_id):
        metadata.append((REQUEST_ID_KEY, error.request_id))
    if isinstance(error, Overloaded):
        metadata.append((RETRY_AFTER_KEY, str(max(0, round(error.retry_after * 1000)))))
    return error.code, _cut(error.message), tuple(metadata)


def from_status(code: str, text: str, metadata: Metadata) -> ExpertMeshError:
    """The error of a status, to be raised by the caller.

    The metadata's error class is used only if it exists and has the code of the status; otherwise `BY_CODE` decides.
    """
    values = {key: value for key, value in metadata if isinstance(value, str)}
    kind = BY_NAME.get(values.get(ERROR_KEY, ""))
    text = _cut(text)
    if kind is None or kind.code != code:
        kind, text = _of_grpc(code, text)
    error = kind(text)
    error.request_id = values.get(REQUEST_ID_KEY)
    if isinstance(error, Overloaded):
        error.retry_after = _seconds(values.get(RETRY_AFTER_KEY, ""), default=error.retry_after)
    return error


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _of_grpc(code: str, text: str) -> tuple[type[ExpertMeshError], str]:
    kind, meaning = BY_CODE.get(code, (ExpertMeshError, "the server failed"))
    if code == "INTERNAL" and text == _CUT_OFF:
        return RouterUnavailable, "the stream was cut off"
    if kind is Overloaded and "larger than max" in text:
        kind, meaning = TooLarge, _TOO_LARGE
    return kind, f"{meaning}: {text}" if text else meaning


def _seconds(milliseconds: str, default: float) -> float:
    if not (milliseconds.isascii() and milliseconds.isdigit() and len(milliseconds) <= 9):
        return default
    return min(int(milliseconds), MAX_RETRY_AFTER_MS) / 1000
