"""What a client and a gateway tell each other about uploads, swaps and leases: records that are checked in full.

A swap and its answers are JSON documents, an upload is a frame for every chunk, the rest are fields of a header. No
torch in here: the client shares it.
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
"""The bytes of a chunk of an upload as clients send it: large ones come as bursts that others wait behind."""

MOST_CHUNK_BYTES = 4 * 2**20
"""The most bytes of one chunk of an upload."""

MODES = ("double", "staged_cpu")
"""Where a candidate waits for its commit: on the device beside the version that serves, or in main memory."""

MAX_CHANGES = 4096
MAX_TIMEOUT = 3600.0
DATA = "data"
T = TypeVar("T")
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class UploadChunk:
    """Which bytes of which upload a chunk holds; `total` and `sha256` are those of the whole, `last` ends it."""

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
    """What one id is to become: the weights of an upload, a version that is kept, or another factory's expert.

    Another factory may come with an upload, the weights of what it makes.
    """

    upload: str | None = None
    sha256: str | None = None
    version: str | None = None
    factory: str | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def check(self, id: str) -> None:
        """Check that exactly one thing is asked for. Raises InvalidRequest naming the id."""
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
    """A swap as a client asks for it; every change is the map of a `ChangeAsked`, `policy` that of a `Policy`."""

    swap_id: str
    changes: dict[str, dict[str, Any]]
    expect: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    mode: str = "double"
    timeout: float = 60.0
    dry_run: bool = False

    def read_changes(self) -> dict[str, ChangeAsked]:
        """The changes, checked. Raises InvalidRequest."""
        if not 1 <= len(self.changes) <= MAX_CHANGES:
            raise InvalidRequest(f"a swap changes 1 to {MAX_CHANGES} ids, not {len(self.changes)}")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InvalidRequest(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} seconds, not {self.timeout:g}")
        found = {}
        for id, change in self.changes.items():
            try:
                found[id] = from_mapping(ChangeAsked, change)
            except InvalidRequest as error:
                raise InvalidRequest(f"{id[:140]}: {error.message}") from None
            found[id].check(id[:140])
        return found


@dataclass(frozen=True, kw_only=True)
class ProgressAsked:
    """Whose progress is asked for."""

    swap_id: str


@dataclass(frozen=True, kw_only=True)
class HistoryAsked:
    """Whose history is asked for."""

    id: str


@dataclass(frozen=True, kw_only=True)
class PinAsked:
    """For how many seconds without use a lease on the current epoch is to live."""

    ttl: float = 30.0


@dataclass(frozen=True, kw_only=True)
class UnpinAsked:
    """The lease that is given back."""

    pin: str


@dataclass(frozen=True, kw_only=True)
class UploadState:
    """How far an upload is: the offset of the next chunk; `done` when all is there and has the sha256."""

    next: int
    done: bool


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A lease on an epoch: give it to the calls that are to run on it, as `call(..., pin=lease)`.

    It ends `ttl` seconds after its last use.

    Example:
        with client.pin() as lease:
            first = client.call("news", x, pin=lease)
            again = client.call("news", x, pin=lease)  # by the very versions of the first
    """

    pin: str
    epoch: int
    ttl: float
    cluster: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class SwapOutcome:
    """What became of a swap: the epoch that it made, the versions before and after, and how far answers moved.

    `drift` is the relative L2 distance of the answers to the probe rows, None where it was not measured. Once
    `committed`, the swap is durable; `flipped` says that every router serves it, `pending` names those that do not yet.
    A rehearsal is not committed and has epoch 0. A swap that was asked for again has no `before`.

    Example:
        outcome = client.swap({"news/e3": "e3.safetensors"})
        print(outcome.before, outcome.after, outcome.drift)
    """

    swap_id: str
    epoch: int
    before: dict[str, str]
    after: dict[str, str]
    drift: dict[str, float | None] = field(default_factory=dict)
    committed: bool = True
    flipped: bool = True
    pending: list[str] = field(default_factory=list)
    cluster: str = field(default="", repr=False)

    def to_document(self) -> dict[str, Any]:
        """The outcome as JSON has it, where infinity is a text."""
        return asdict(self) | {"drift": {id: _told(value) for id, value in self.drift.items()}}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SwapOutcome:
        """Read what `to_document` wrote. Raises DataLoss for anything else."""
        drift = document.get("drift")
        infinite = [id for id, value in drift.items() if value == "inf"] if isinstance(drift, dict) else []
        known = {**document, "drift": {**drift, **dict.fromkeys(infinite)}} if isinstance(drift, dict) else document
        outcome = read_answer(cls, known)
        outcome.drift.update(dict.fromkeys(infinite, math.inf))
        return outcome


def read_answer(kind: type[T], document: Mapping[str, Any]) -> T:
    """A record that the server sent. Raises DataLoss for one that is not whole."""
    try:
        return from_mapping(kind, document)
    except InvalidRequest as error:
        raise DataLoss(f"the reply cannot be read: {error.message}") from None


def is_upload_id(value: object) -> bool:
    """Whether a value may be the id of an upload."""
    return isinstance(value, str) and _UPLOAD_ID.fullmatch(value) is not None


def check_upload(upload_id: str, sha256: str) -> None:
    """Check the id and the sha256 of an upload. Raises InvalidRequest."""
    if not is_upload_id(upload_id):
        raise InvalidRequest("an upload id must be 32 hex digits, such as uuid4().hex")
    if not _SHA256.fullmatch(sha256):
        raise InvalidRequest("sha256 must be 64 lower-case hex digits")


def _told(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else "inf"
