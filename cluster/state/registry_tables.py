"""Reads and writes the registry's tables; the registry begins and ends the transactions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...experts.errors import Aborted, DataLoss, FailedPrecondition, NotFound
from .committed import Committed
from .records import (
    ABORTED,
    COMMITTED,
    OPEN,
    REMOVED,
    EpochRecord,
    SwapRecord,
    VersionRecord,
    check_id,
    damaged,
    from_json,
    to_json,
)
from .registry_schema import Database, has_replicas, meta

KEPT_SWAPS = 1000
"""How many of the latest swaps `collect` keeps in the journal, so that a repeated request finds its outcome."""

_EPOCH = "SELECT number, created, swap_id, versions FROM epochs"
_SWAP = (
    "SELECT swap_id, state, plan, begun, ended, epoch, message, before, after"
    " FROM swaps LEFT JOIN outcomes USING (swap_id)"
)


def add_version(db: Database, record: VersionRecord) -> None:
    """Add a version, unless an equal record exists. Raises DataLoss if another record has its id and version."""
    text = record.to_json()
    row = _one(db, "SELECT record FROM versions WHERE id = ? AND version = ?", record.id, record.version)
    if row is None:
        columns = (record.id, record.version, record.counter, text)
        db.execute("INSERT INTO versions (id, version, counter, record) VALUES (?, ?, ?, ?)", columns)
        _count_to(db, record.id, record.counter)
    elif row[0] != text:
        raise DataLoss(
            f"{record.version} of {record.id} is already registered with other content: use the next counter"
        )


def find_version(db: Database, id: str, version: str) -> VersionRecord:
    """The record of a version. Raises NotFound."""
    row = _one(db, "SELECT record FROM versions WHERE id = ? AND version = ?", id, version)
    if row is None:
        raise NotFound(f"{version} of {id} is not registered: the history of {id} lists what is")
    return VersionRecord.from_json(row[0])


def history(db: Database, id: str) -> list[VersionRecord]:
    """The versions of an id, oldest first."""
    rows = db.execute("SELECT record FROM versions WHERE id = ? ORDER BY counter, seq", (id,))
    return [VersionRecord.from_json(text) for (text,) in rows]


def replicas(db: Database) -> dict[str, int]:
    """The numbers of replicas that were asked for, by group."""
    if not has_replicas(db):
        return {}
    return {str(group): int(wanted) for group, wanted in db.execute("SELECT id, wanted FROM replicas ORDER BY id")}


def set_replicas(db: Database, wanted: Mapping[str, int]) -> None:
    """Replace the numbers of replicas by these, and count the change."""
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'replicas'")
    db.execute("DELETE FROM replicas")
    for group, number in wanted.items():
        db.execute("INSERT INTO replicas (id, wanted) VALUES (?, ?)", (group, number))


def take_counter(db: Database, id: str) -> int:
    """Allocate the next counter of an id."""
    row = _one(db, "SELECT last FROM counters WHERE id = ?", id)
    counter = 1 if row is None else int(row[0]) + 1
    _count_to(db, id, counter)
    return counter


def current_epoch(db: Database) -> EpochRecord | None:
    """The newest epoch."""
    row = _one(db, f"{_EPOCH} ORDER BY number DESC LIMIT 1")
    return None if row is None else _epoch(row)


def current_records(db: Database) -> dict[str, VersionRecord]:
    """The records of what the newest epoch names, by id; without those that are missing."""
    epoch = current_epoch(db)
    if epoch is None:
        return {}
    found = {id: [item for item in history(db, id) if item.version == v] for id, v in epoch.versions.items()}
    return {id: records[0] for id, records in found.items() if records}


def removed(db: Database) -> set[str]:
    """The ids of what was removed by name."""
    return {str(id) for (id,) in db.execute("SELECT id FROM declared WHERE digest = ?", (REMOVED,))}


def find_epoch(db: Database, number: int) -> EpochRecord:
    """An epoch. Raises FailedPrecondition for one that was collected, NotFound for one that never existed."""
    row = _one(db, f"{_EPOCH} WHERE number = ?", number)
    if row is not None:
        return _epoch(row)
    current = current_epoch(db)
    if current is None or not 0 < number < current.number:
        raise NotFound(f"there is no epoch {number} (current: {'none yet' if current is None else current.number})")
    raise FailedPrecondition(
        f"epoch {number} is not kept any more (current: {current.number}); retain_epochs sets how many are"
    )


def all_epochs(db: Database) -> list[EpochRecord]:
    """Every epoch, oldest first."""
    return [_epoch(row) for row in db.execute(f"{_EPOCH} ORDER BY number")]


def committed(db: Database) -> Committed:
    """What is committed, as it is recorded beside the registry."""
    declared = dict(db.execute("SELECT id, digest FROM declared ORDER BY id"))
    cluster_id, epochs = str(meta(db, "cluster_id")), tuple(all_epochs(db))
    row = _one(db, "SELECT value FROM meta WHERE key = 'replicas'")  # an earlier build has none
    change = 0 if row is None else int(row[0])
    return Committed(
        cluster_id=cluster_id, epochs=epochs, declared=declared, replicas=replicas(db), replicas_change=change
    )


def restore(
    db: Database, committed: Committed, records: Collection[VersionRecord], counters: Mapping[str, int]
) -> None:
    """Fill empty tables with what was committed."""
    db.execute("UPDATE meta SET value = ? WHERE key = 'cluster_id'", (committed.cluster_id,))
    for record in sorted(records, key=lambda record: record.counter):
        add_version(db, record)
    for id, counter in counters.items():
        _count_to(db, id, counter)
    for epoch in committed.epochs:
        begin_swap(db, epoch.swap_id, "{}", epoch.created)
        add_epoch(db, epoch)
    set_declared(db, committed.declared)
    set_replicas(db, committed.replicas)
    db.execute("UPDATE meta SET value = ? WHERE key = 'replicas'", (committed.replicas_change,))


def add_epoch(db: Database, epoch: EpochRecord) -> None:
    """Add an epoch, and mark its swap committed."""
    columns = (epoch.number, epoch.created, epoch.swap_id, to_json(epoch.versions, "the epoch"))
    db.execute("INSERT INTO epochs (number, created, swap_id, versions) VALUES (?, ?, ?, ?)", columns)
    ended = (COMMITTED, epoch.created, epoch.number, epoch.swap_id)
    db.execute("UPDATE swaps SET state = ?, ended = ?, epoch = ? WHERE swap_id = ?", ended)


def set_outcome(db: Database, swap_id: str, versions: Mapping[str, str], changes: Mapping[str, str]) -> None:
    """Write down what a swap has replaced by what, which outlives its epoch."""
    before = {id: versions.get(id, "") for id in changes}
    db.execute("INSERT INTO outcomes VALUES (?, ?, ?)", (swap_id, to_json(before, "before"), to_json(changes, "after")))


def set_declared(db: Database, digests: Mapping[str, str]) -> None:
    """Write down the digests of what is declared, by id. Raises InvalidRequest for what is no id."""
    for id, digest in digests.items():
        check_id(id)
        db.execute("INSERT OR REPLACE INTO declared VALUES (?, ?)", (id, digest))


def check_expected(expect: Mapping[str, str | None], versions: Mapping[str, str]) -> None:
    """Compare what a writer expects with what there is. Raises Aborted that names the first difference."""
    for id, version in sorted(expect.items()):
        if versions.get(id) != version:
            raise Aborted(
                f"{id}: expected {version or 'no version'}, found {versions.get(id) or 'none'}: "
                "another change came first"
            )


def changed(db: Database, versions: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Apply changes to a map. Raises NotFound for a version that is not registered."""
    return {**versions, **{id: find_version(db, id, version).version for id, version in changes.items()}}


def made_before(db: Database, swap: SwapRecord, changes: Mapping[str, str]) -> EpochRecord:
    """The epoch of a committed swap. Raises FailedPrecondition if the swap made other changes."""
    epoch = find_epoch(db, swap.epoch or 0)
    if any(epoch.versions.get(id) != version for id, version in changes.items()):
        raise FailedPrecondition(f"swap {swap.swap_id} has committed other changes: use a new swap id")
    return epoch


def begin_swap(db: Database, swap_id: str, plan: str, now: float) -> None:
    """Add an open swap."""
    newest = "(SELECT COALESCE(MAX(seq), 0) FROM versions)"
    columns = (swap_id, OPEN, plan, now)
    db.execute(
        f"INSERT INTO swaps (swap_id, state, plan, begun, message, since) VALUES (?, ?, ?, ?, '', {newest})", columns
    )


def end_swap(db: Database, swap: SwapRecord, state: str, message: str, now: float) -> None:
    """Mark a swap as ended; its first message is kept. Raises Aborted or FailedPrecondition if that is not possible."""
    if swap.state == OPEN and state == COMMITTED:
        raise FailedPrecondition(f"swap {swap.swap_id} has committed nothing: only `commit` can do that")
    if swap.state not in (OPEN, state):
        raise Aborted(f"swap {swap.swap_id} is already {swap.state}: look at its result")
    sets = "state = ?, ended = COALESCE(ended, ?), message = CASE message WHEN '' THEN ? ELSE message END"
    db.execute(f"UPDATE swaps SET {sets} WHERE swap_id = ?", (state, now, message, swap.swap_id))


def find_swap(db: Database, swap_id: str) -> SwapRecord | None:
    """A swap, or None."""
    row = _one(db, f"{_SWAP} WHERE swap_id = ?", swap_id)
    return None if row is None else _swap(row)


def begun_swap(db: Database, swap_id: str) -> SwapRecord:
    """A swap. Raises NotFound."""
    swap = find_swap(db, swap_id)
    if swap is None:
        raise NotFound(f"there is no swap {swap_id}: begin it first")
    return swap


def open_swaps(db: Database) -> list[SwapRecord]:
    """The swaps that have not ended, oldest first."""
    return [_swap(row) for row in db.execute(f"{_SWAP} WHERE state = ? ORDER BY seq", (OPEN,))]


def collect(db: Database, retain_epochs: int, in_use: Collection[tuple[str, str]]) -> list[VersionRecord]:
    """Delete old epochs, unused versions and old swaps; returns the deleted versions."""
    kept = all_epochs(db)[-(retain_epochs + 1) :]
    if kept:
        db.execute("DELETE FROM epochs WHERE number < ?", (kept[0].number,))
    named = {(id, version) for epoch in kept for id, version in epoch.versions.items()} | set(in_use)
    plans = [to_json(swap.plan, "the plan of a swap") for swap in open_swaps(db)]
    # A version registered while a swap is open may be its candidate.
    since = "(SELECT COALESCE(MIN(since), 9e18) FROM swaps WHERE state = ?)"
    rows = db.execute(f"SELECT record FROM versions WHERE seq <= {since} ORDER BY seq", (OPEN,)).fetchall()
    records = [VersionRecord.from_json(text) for (text,) in rows]
    unused = [record for record in records if (record.id, record.version) not in named]
    unused = [record for record in unused if not any(record.version in plan for plan in plans)]
    for record in unused:
        db.execute("DELETE FROM versions WHERE id = ? AND version = ?", (record.id, record.version))
    db.execute(
        "DELETE FROM swaps WHERE state != ? AND seq <= (SELECT MAX(seq) FROM swaps) - ?"
        " AND swap_id NOT IN (SELECT swap_id FROM epochs)",
        (OPEN, KEPT_SWAPS),
    )
    db.execute("DELETE FROM outcomes WHERE swap_id NOT IN (SELECT swap_id FROM swaps)")
    return unused


def _count_to(db: Database, id: str, counter: int) -> None:
    db.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET last = MAX(last, excluded.last)",
        (id, counter),
    )


def _one(db: Database, sql: str, *parameters: object) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = db.execute(sql, parameters).fetchone()
    return row


def _epoch(row: tuple[Any, ...]) -> EpochRecord:
    number, created, swap_id, versions = row
    return EpochRecord(number=number, versions=from_json(versions), created=created, swap_id=swap_id)


def _swap(row: tuple[Any, ...]) -> SwapRecord:
    swap_id, state, plan, begun, ended, epoch, message, before, after = row
    if state not in (OPEN, COMMITTED, ABORTED) or (state == COMMITTED) != (epoch is not None):
        raise damaged(f"swap {swap_id} is neither open, committed nor aborted")
    return SwapRecord(
        swap_id=swap_id,
        state=state,
        plan=from_json(plan),
        begun=begun,
        ended=ended,
        epoch=epoch,
        message=message,
        before={} if before is None else from_json(before),
        after={} if after is None else from_json(after),
    )
