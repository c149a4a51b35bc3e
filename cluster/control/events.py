"""What a swap's state machine is told (events), and what the controller's decisions ask of its shell (actions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...experts.errors import ExpertMeshError


@dataclass(frozen=True)
class MemberReported:
    """A live member of this incarnation has to hold candidates of these ids."""

    member: str
    incarnation: str
    ids: frozenset[str]


@dataclass(frozen=True)
class MemberGone:
    """A member does not live any more; when it is back it loads what the registry says."""

    member: str


@dataclass(frozen=True)
class Staged:
    """A member's receipt: it holds and has verified its candidate of `id`, which is this version."""

    member: str
    incarnation: str
    id: str
    version: str


@dataclass(frozen=True)
class StageRefused:
    """A member could not stage or verify its candidate of `id`."""

    member: str
    incarnation: str
    id: str
    error: ExpertMeshError


@dataclass(frozen=True)
class DiedStaging:
    """A member's process ended while it built and verified its candidate of `id`, which may be the reason."""

    member: str
    id: str


@dataclass(frozen=True)
class NotReached:
    """A member was gone before it could stage its candidate of `id`, which is not the reason."""

    member: str
    id: str


@dataclass(frozen=True)
class Committed:
    """The registry's transaction is durable: these versions are the epoch of this number."""

    epoch: int


@dataclass(frozen=True)
class CommitRefused:
    """The registry's transaction was refused; nothing has changed."""

    error: ExpertMeshError


@dataclass(frozen=True)
class RouterReported:
    """A router says which epoch it has adopted, and which is the oldest that a request of it pins."""

    router: str
    epoch: int
    oldest_pinned: int


@dataclass(frozen=True)
class RouterGone:
    """A router has restarted, or was not heard for so long that what it may pin is given up."""

    router: str


@dataclass(frozen=True)
class TimeUp:
    """The swap has taken too long to be staged."""


Event = (
    MemberReported
    | MemberGone
    | Staged
    | StageRefused
    | DiedStaging
    | NotReached
    | Committed
    | CommitRefused
    | RouterReported
    | RouterGone
    | TimeUp
)


@dataclass(frozen=True)
class StageCandidate:
    """Ask a member to load and verify its candidate of a swap, beside what it serves."""

    member: str
    incarnation: str
    swap_id: str
    id: str


@dataclass(frozen=True)
class LoadVersion:
    """Ask a member to load a committed version that it has to hold and does not."""

    member: str
    incarnation: str
    id: str
    version: str


@dataclass(frozen=True)
class UnloadVersion:
    """Ask a member to forget a version that nothing needs any more."""

    member: str
    incarnation: str
    id: str
    version: str


@dataclass(frozen=True)
class CommitSwap:
    """Make the versions of a swap the next epoch, in one durable transaction."""

    swap_id: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Sync:
    """Tell every router the replicas, the epochs in use and the current one."""


@dataclass(frozen=True)
class FinishSwap:
    """Tell whoever asked for a swap its outcome: the epoch, or why there is none. Its candidates may be forgotten."""

    swap_id: str
    epoch: int | None
    error: ExpertMeshError | None = None


Action = StageCandidate | LoadVersion | UnloadVersion | CommitSwap | Sync | FinishSwap
