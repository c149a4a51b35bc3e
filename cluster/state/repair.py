"""Repairs a state folder: rebuilds a damaged registry from the record of what was committed and from the manifests.

Nothing is deleted: what is replaced is moved to quarantine/.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ...experts.errors import DataLoss, NotFound
from ..machine.durable_files import sync_folder
from .committed import COMMITTED_FILE, Committed, read_committed
from .records import EpochRecord, VersionRecord, counter_of
from .registry import FILE, Registry, rebuild
from .state_lock import lock_state
from .version_folders import QUARANTINE, VERSIONS, VersionStore, quarantine, stored_versions

QUARANTINED = f"{QUARANTINE}/{VERSIONS}"
Pair = tuple[str, str]


def repair(state_dir: Path) -> list[str]:
    """Make a state folder usable again; returns what was found and done, a line each.

    A registry that opens is left as it is. Another is rebuilt with the epochs of the record of what was committed.
    Where that is damaged as well, one epoch is made of the newest version of each id whose files are whole. Every
    version that an epoch names is then checked against its manifest.

    Raises NotFound if the folder holds no state, FailedPrecondition while a cluster uses it.
    """
    if not any((state_dir / name).exists() for name in (FILE, COMMITTED_FILE, VERSIONS)):
        raise NotFound(f"{state_dir} holds no state of a cluster: name its state_dir")
    with lock_state(state_dir, "expertmesh repair"):
        store = VersionStore(state_dir)
        lines = [*_registry(state_dir, store)]
        with Registry(state_dir) as registry:
            epochs = registry.epochs()
        for epoch in epochs:
            lines += _damaged_versions(store, epoch)
        if epochs:
            lines.append(f"the current epoch is {epochs[-1].number}; it names {len(epochs[-1].versions)} versions")
    return lines


def _registry(folder: Path, store: VersionStore) -> Iterator[str]:
    """Rebuild the registry, unless it opens."""
    try:
        Registry(folder).close()
        yield "the registry is whole, and was left as it is"
        return
    except DataLoss as error:
        yield error.message.partition(". Stop")[0]
    committed: Committed | None = None
    try:
        committed = read_committed(folder)
    except DataLoss as error:
        yield error.message
        quarantine(folder, folder / COMMITTED_FILE)
    if committed is None:
        committed = _newest_whole(folder, store)
        yield "there is no record of what was committed: the newest whole version of each id becomes the current one"
    named = {pair for epoch in committed.epochs for pair in epoch.versions.items()}
    yield from _take_back(folder, named)
    records = _records(folder, store)
    epochs = [epoch for epoch in committed.epochs[:-1] if records.keys() >= set(epoch.versions.items())]
    kept = replace(committed, epochs=(*epochs, *committed.epochs[-1:]))
    _replace(folder, kept, [records[pair] for pair in named & records.keys()])
    yield f"the registry was rebuilt at epoch {kept.newest}; the damaged one is in {QUARANTINE}/"


def _newest_whole(folder: Path, store: VersionStore) -> Committed:
    """One epoch of the newest version of each id whose record can be read and whose weights match their checksum."""
    newest: dict[str, str] = {}
    for id, version in sorted(_records(folder, store), key=lambda pair: counter_of(pair[1])):
        if _damage(store, id, version) is None:
            newest[id] = version
    epoch = EpochRecord(number=1, versions=newest, created=time.time(), swap_id=f"repair-{uuid.uuid4().hex[:12]}")
    return Committed(cluster_id=str(uuid.uuid4()), epochs=(epoch,) if newest else (), declared={})


def _take_back(folder: Path, named: set[Pair]) -> Iterator[str]:
    """Move versions that the epochs name from quarantine to their place."""
    stored = set(stored_versions(folder))
    for id, version in sorted(named & set(stored_versions(folder, QUARANTINED)) - stored):
        target = folder.joinpath(VERSIONS, *id.split("/"), version)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rename(folder.joinpath(QUARANTINED, *id.split("/"), version), target)
        sync_folder(target.parent)
        yield f"{version} of {id} was taken back from {QUARANTINED}"


def _records(folder: Path, store: VersionStore) -> Mapping[Pair, VersionRecord]:
    """The records of all stored versions whose manifest can be read."""
    found: dict[Pair, VersionRecord] = {}
    for id, version in stored_versions(folder):
        try:
            record = VersionRecord.from_json(store.manifest(id, version).get("record", ""))
        except DataLoss:
            continue
        if (record.id, record.version) == (id, version):
            found[id, version] = record
    return found


def _replace(folder: Path, committed: Committed, records: list[VersionRecord]) -> None:
    """Put a new registry in the place of the damaged one. After a crash in between, another repair does it."""
    new = folder / f"{FILE}.rebuilt"
    new.unlink(missing_ok=True)
    counters: dict[str, int] = {}
    for id, version in (*stored_versions(folder), *stored_versions(folder, QUARANTINED)):
        counters[id] = max(counters.get(id, 0), counter_of(version))
    rebuild(new, committed, records, counters)
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal"):
        if (folder / name).exists():
            quarantine(folder, folder / name)
    os.rename(new, folder / FILE)
    sync_folder(folder)


def _damaged_versions(store: VersionStore, epoch: EpochRecord) -> Iterator[str]:
    for id, version in sorted(epoch.versions.items()):
        damage = _damage(store, id, version)
        if damage is not None:
            yield f"epoch {epoch.number} names {version} of {id}: {damage}"


def _damage(store: VersionStore, id: str, version: str) -> str | None:
    try:
        store.verify(id, version)
    except (DataLoss, NotFound) as error:
        return error.message
    return None
