"""What the tests of the registry and of the version folders share: records, swaps, and a disk that refuses."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.cluster.state.records import EpochRecord, VersionRecord
from expertmesh.cluster.state.registry import Registry

E3, E4, GATE = "news/e3", "news/e4", "news/gate"


def record(id: str = E3, counter: int = 1, **more: Any) -> VersionRecord:
    """The record of a version that is made up."""
    digest = hashlib.sha256(f"{id} {counter}".encode()).hexdigest()
    made = VersionRecord(
        id=id,
        version=f"v{counter}-{digest[:12]}",
        counter=counter,
        digest=digest,
        tensor_digest="00" * 32,
        origin={"factory": "torch.nn:Linear", "args": [2, 2], "kwargs": {"bias": False}},
        nbytes=16,
        created=1.7e9,
        parent=None,
        ephemeral=False,
        note="declared",
    )
    return replace(made, **more)


def swapped(
    registry: Registry,
    *records: VersionRecord,
    expect: dict[str, str | None] | None = None,
    declared: dict[str, str] | None = None,
) -> EpochRecord:
    """Register versions and commit them as one swap, which is named for the first of them."""
    swap_id = f"swap-{records[0].version}"
    registry.begin_swap(swap_id, {})
    for made in records:
        registry.add_version(made)
    changes = {made.id: made.version for made in records}
    return registry.commit(swap_id, changes, expect=expect or {}, declared=declared)


def files(folder: Path) -> set[str]:
    """Every file under a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
