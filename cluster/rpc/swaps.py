"""The records of uploads, swaps and leases that client and gateway exchange, with their checks.

A swap and its answers are JSON documents, an upload is one frame per chunk, and the others are header fields. No torch
here, because the client imports it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ...experts.errors import DataLoss, InvalidRequest
from ...experts.protocol import from_mapping

CHUNK_BYTES = 2**20
"""The chunk size of an upload by a client, in bytes: larger chunks are bursts that delay other calls."""

MOST_CHUNK_BYTES = 4 * 2**20
"""The maximum chunk size of an upload, in bytes."""

MODES = ("double", "staged_cpu")
"""Where a staged version is kept until the commit: on the device beside the current one, or in main memory."""

MAX_CHANGES = 4096
MAX_TIMEOUT = 3600.0
DATA = "data"
T = TypeVar("T")
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class UploadChunk:
    """The header of an upload chunk; `total` and `sha256` are those of the whole file, `last` marks the last chunk."""

    upload_id: str
    offset: int
    total: int
    sha256: str
    last: bool = False

    def check(self, nbytes: int) -> None:
        """Check the chunk and the size of its data. Raises InvalidRequest."""
        check_upload(self.upload_id, self.sha256)
        if nbytes > MOST_CHUNK_BYTES:
            raise InvalidRequest(f"a chunk may have at most {MOST_CHUNK_BYTES} bytes, not {nbytes}")
        if self.offset < 0 or self.total < self.offset + nbytes:
            raise InvalidRequest(f"{nbytes} bytes at {self.offset} are outside the {self.total} bytes of the upload")
        if self.last and self.offset + nbytes != self.total:
            raise InvalidRequest(
                f"the last chunk ends at {self.offset + nbytes} of the {self.total} bytes of the upload"
            )


@dataclass(frozen=True, kw_only=True)
class ChangeAsked:
    """The change of one id: to uploaded weights, to a retained version, or to an expert of another factory.

    Another factory may be combined with an upload, the weights of its expert.
    """

    upload: str | None = None
    sha256: str | None = None
    version: str | None = None
    factory: str | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    framework: str | None = None

    def check(self, id: str) -> None:
        """Check that the change is unambiguous. Raises an InvalidRequest that names the id."""
        if (self.upload is None) != (self.sha256 is None):
            raise InvalidRequest(f"{id}: upload and sha256 belong together")
        if self.upload is not None and self.sha256 is not None:
            check_upload(self.upload, self.sha256)
        if self.version is not None and (self.upload is not None or self.factory is not None):
            raise InvalidRequest(f"{id}: a version has its own weights and code: leave upload and factory out")
        if self.version is None and self.upload is None and self.factory is None:
            raise InvalidRequest(f"{id}: give an upload, a version or a factory")
        if self.factory is None and (self.args or self.kwargs):
            raise InvalidRequest(f"{id}: args and kwargs need a factory")


@dataclass(frozen=True, kw_only=True)
class SwapAsked:
    """A client's request for a swap; each change is a map of `ChangeAsked`, and `policy` one of `Policy`.

    `adopts` are the digests of the declarations that the changes carry out, by id; see `expertmesh apply`.
    """

    swap_id: str
    changes: dict[str, dict[str, Any]]
    expect: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    mode: str = "double"
    timeout: float = 60.0
    dry_run: bool = False
    adopts: dict[str, str] = field(default_factory=dict)

    def read_changes(self) -> dict[str, ChangeAsked]:
        """Read and check the changes. Raises InvalidRequest."""
        if not 1 <= len(self.changes) <= MAX_CHANGES:
            raise InvalidRequest(f"a swap changes 1 to {MAX_CHANGES} ids, not {len(self.changes)}")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InvalidRequest(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} seconds, not {self.timeout:g}")
        changes = {}
        for id, change in self.changes.items():
            try:
                changes[id] = from_mapping(ChangeAsked, change)
            except InvalidRequest as error:
                raise InvalidRequest(f"{id[:140]}: {error.message}") from None
            changes[id].check(id[:140])
        for id, digest in self.adopts.items():
            if id not in changes or not SHA256.fullmatch(digest):
                raise InvalidRequest(f"adopts: {id[:140]} must be changed, by a digest of 64 lower-case hex digits")
        return changes


@dataclass(frozen=True, kw_only=True)
class ProgressAsked:
    """A request for the progress of a swap."""

    swap_id: str


@dataclass(frozen=True, kw_only=True)
class HistoryAsked:
    """A request for the history of an id."""

    id: str


@dataclass(frozen=True, kw_only=True)
class NothingAsked:
    """A request without fields."""


@dataclass(frozen=True, kw_only=True)
class PinAsked:
    """A request for a lease on the current epoch, which ends after `ttl` seconds without use."""

    ttl: float = 30.0


@dataclass(frozen=True, kw_only=True)
class UnpinAsked:
    """A request to end a lease."""

    pin: str


@dataclass(frozen=True, kw_only=True)
class UploadState:
    """The progress of an upload: the offset of the next chunk; `done` once it is complete and its sha256 matches."""

    next: int
    done: bool


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A lease on an epoch: pass it to calls that must run on that epoch, as `call(..., pin=lease)`.

    It ends `ttl` seconds after its last use, or 10 seconds after a swap has replaced its epoch.

    Example:
        with client.pin() as lease:
            first = client.call("news", x, pin=lease)
            again = client.call("news", x, pin=lease)  # with exactly the same versions
    """

    pin: str
    epoch: int
    ttl: float
    cluster: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class SwapOutcome:
    """The outcome of a swap: its epoch, the versions before and after, and how far the outputs moved.

    `drift` is the relative L2 distance between old and new outputs on the probe rows, None if not measured; then
    `unmeasured` says why. A `committed` swap is durable. `flipped` means that every router serves it; `pending` names
    the routers that do not yet. A dry run is not committed and has epoch 0. The outcome of a repeated swap id has no
    `before`.

    Example:
        outcome = client.swap({"news/e3": "e3.safetensors"})
        print(outcome.before, outcome.after, outcome.drift)
    """

    swap_id: str
    epoch: int
    before: dict[str, str]
    after: dict[str, str]
    drift: dict[str, float | None] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    committed: bool = True
    flipped: bool = True
    pending: list[str] = field(default_factory=list)
    cluster: str = field(default="", repr=False)

    def to_document(self) -> dict[str, Any]:
        """The outcome as a JSON document, with infinity as text."""
        return asdict(self) | {"drift": {id: _finite_or_text(value) for id, value in self.drift.items()}}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SwapOutcome:
        """Read a document from `to_document`. Raises DataLoss for anything else."""
        drift = document.get("drift")
        infinite = [id for id, value in drift.items() if value == "inf"] if isinstance(drift, dict) else []
        finite = {**document, "drift": {**drift, **dict.fromkeys(infinite)}} if isinstance(drift, dict) else document
        outcome = read_answer(cls, finite)
        outcome.drift.update(dict.fromkeys(infinite, math.inf))
        return outcome


def read_answer(kind: type[T], document: Mapping[str, Any]) -> T:
    """Read a record from the server's reply. Raises DataLoss if it is malformed."""
    try:
        return from_mapping(kind, document)
    except InvalidRequest as error:
        raise DataLoss(f"the reply cannot be read: {error.message}") from None


def is_upload_id(value: object) -> bool:
    """Whether a value is a valid upload id."""
    return isinstance(value, str) and _UPLOAD_ID.fullmatch(value) is not None


def check_upload(upload_id: str, sha256: str) -> None:
    """Check the id and the sha256 of an upload. Raises InvalidRequest."""
    if not is_upload_id(upload_id):
        raise InvalidRequest("an upload id must be 32 hex digits, such as uuid4().hex")
    if not SHA256.fullmatch(sha256):
        raise InvalidRequest("sha256 must be 64 lower-case hex digits")


def _finite_or_text(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else "inf"
