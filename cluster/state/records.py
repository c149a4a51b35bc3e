"""Records of versions, epochs and swaps as the registry stores them, and the syntax of their names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...experts.errors import DataLoss, InvalidRequest
from ...experts.names import is_name

OPEN, COMMITTED, ABORTED = "open", "committed", "aborted"
REMOVED = "removed"
"""Stands for the digest of the declaration of a layer that was removed by name."""

_VERSION = re.compile(r"v(0|[1-9][0-9]{0,17})-([0-9a-f]{12})")
_SWAP_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """One immutable version of an expert, a gate, or what a layer is made of.

    `digest` and `tensor_digest` are sha256 as hexadecimal text, of the behaviour and of the tensors alone; `origin` is
    the declaration it came from, as JSON has it; `nbytes` is the size of its weights in bytes; `created` is in seconds
    since 1970; `parent` is the version that it replaced; `note` says how it came: "declared", "swap <id>".
    `declared`: a declaration brought it by itself, so that an edited declaration may replace it.

    Raises InvalidRequest for an id that is not "layer/expert", or a version that does not match counter and digest.
    """

    id: str
    version: str
    counter: int
    digest: str
    tensor_digest: str
    origin: Mapping[str, Any]
    nbytes: int
    created: float
    parent: str | None
    ephemeral: bool
    note: str
    declared: bool = False

    def __post_init__(self) -> None:
        check_version(self.id, self.version)
        if type(self.counter) is not int or self.version != f"v{self.counter}-{self.digest[:12]}":
            raise InvalidRequest(
                f"version {self.version} of {self.id} is not made of its counter and the first 12 digits of its digest"
            )

    def to_json(self) -> str:
        """The record as JSON, the same text for equal records. Raises InvalidRequest if `origin` is not plain JSON."""
        return to_json(asdict(self), f"the origin of {self.id}")

    @classmethod
    def from_json(cls, text: str) -> VersionRecord:
        """Read what `to_json` wrote. Raises DataLoss for anything else."""
        try:
            fields = from_json(text)
            if "declared" not in fields:  # written before the field was there
                fields["declared"] = fields.get("note") == "declared"
            return cls(**fields)
        except (TypeError, InvalidRequest):
            raise damaged("the record of a version cannot be read") from None


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One immutable map {id of an expert, gate or layer -> version}, and the swap that made it.

    `created` is in seconds since 1970.
    """

    number: int
    versions: Mapping[str, str]
    created: float
    swap_id: str


@dataclass(frozen=True, kw_only=True)
class SwapRecord:
    """A swap in the journal: "open" once begun, then "committed" as `epoch`, or "aborted".

    `before` and `after` are the versions, by id, that a committed one has replaced and brought; empty where an earlier
    build has committed it.
    """

    swap_id: str
    state: str
    plan: Mapping[str, Any]
    begun: float
    ended: float | None
    epoch: int | None
    message: str
    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)


def check_id(id: str) -> None:
    """Check that an id is "layer/expert" or "layer/gate", which also makes it a safe relative path.

    Raises InvalidRequest.
    """
    if not isinstance(id, str) or id.count("/") != 1 or not all(map(is_name, id.split("/"))):
        raise InvalidRequest(f'{id!r} is not the id of an expert or gate: write it as "layer/expert" or "layer/gate"')


def check_version(id: str, version: str) -> None:
    """Check an id and the name of one of its versions. Raises InvalidRequest."""
    check_id(id)
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise InvalidRequest(f"{version!r} of {id} is not a version: write it as in v7-3fa1c2d40b9e")


def is_version(name: str) -> bool:
    """Whether a name has the form of a version."""
    return _VERSION.fullmatch(name) is not None


def counter_of(version: str) -> int:
    """The counter of a version that `is_version`."""
    return int(version[1:].partition("-")[0])


def check_swap_id(swap_id: str) -> None:
    """Check that a swap's id is 1 to 128 letters, digits, '_', '.', ':' or '-'. Raises InvalidRequest."""
    if not isinstance(swap_id, str) or not _SWAP_ID.fullmatch(swap_id):
        raise InvalidRequest(f"swap id {swap_id!r} must be 1 to 128 letters, digits, '_', '.', ':' or '-'")


def to_json(value: Mapping[str, Any], what: str) -> str:
    """A map as JSON, the same text for equal maps. Raises InvalidRequest naming `what` if a value is not plain JSON."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} must be plain values (text, numbers, lists, maps): {error}") from None


def from_json(text: str) -> dict[str, Any]:
    """Read a map that `to_json` wrote. Raises DataLoss for anything else."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged("a map in it cannot be read")
    return value


def damaged(why: str) -> DataLoss:
    """The error for a damaged registry; the remedy is the same for every cause."""
    return DataLoss(
        f"the registry (registry.sqlite in state_dir) is damaged: {why}. Stop the cluster and run `expertmesh repair`, "
        "which rebuilds it from the other files of state_dir and deletes nothing, or restore the folder from a backup"
    )
