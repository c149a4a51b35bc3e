"""What the controller's decisions want done: the orders that its shell carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..experts.errors import ExpertMeshError


@dataclass(frozen=True)
class StageCandidate:
    """Ask a member to stage and verify its candidate of a swap."""

    member: str
    incarnation: str
    swap_id: str
    id: str


@dataclass(frozen=True)
class Load:
    """Ask a member to load a committed version that it has to hold and does not."""

    member: str
    incarnation: str
    id: str
    version: str


@dataclass(frozen=True)
class Unload:
    """Ask a member to forget a version that nothing needs any more."""

    member: str
    incarnation: str
    id: str
    version: str


@dataclass(frozen=True)
class CommitSwap:
    """Make the versions of a swap the next epoch, durably."""

    swap_id: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Sync:
    """Tell every router the replicas, the epochs in use and the current one."""


@dataclass(frozen=True)
class Answer:
    """Tell whoever asked for a swap what became of it."""

    swap_id: str
    epoch: int | None
    error: ExpertMeshError | None


Order = StageCandidate | Load | Unload | CommitSwap | Sync | Answer
