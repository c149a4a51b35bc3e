"""The registry: all versions, the current epoch and the swaps in progress, in one SQLite file.

Each change is one transaction that is on disk before the call returns. There is one writer at a time: opening the
registry increments its `term`, and all further changes by earlier writers are refused.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ...experts.errors import Aborted, ConfigError, DataLoss, FailedPrecondition, Fenced, InvalidRequest, Unavailable
from ..machine.durable_files import private_folder, sync_folder
from . import registry_schema, registry_tables
from .committed import Committed, check_not_behind, read_committed, write_committed
from .records import (
    ABORTED,
    COMMITTED,
    EpochRecord,
    SwapRecord,
    VersionRecord,
    check_id,
    check_swap_id,
    damaged,
    to_json,
)

log = logging.getLogger(__name__)
FILE = "registry.sqlite"
T = TypeVar("T")

_BUSY_SECONDS = 10.0
_MESSAGE_CHARACTERS = 2000


class Registry:
    """The durable state of one cluster. All methods are thread-safe and block on disk I/O.

    `cluster_id` is created once, with the registry; `term` is the number of times the registry has been opened. `clock`
    returns seconds since 1970.

    Opening raises FailedPrecondition for a registry of another schema, DataLoss for one that is damaged, missing
    although versions are stored, or behind the record of what was committed, ConfigError for a folder that other users
    can write to. Every method raises Unavailable if the disk fails, and every change raises Aborted once another writer
    has opened the registry.
    """

    def __init__(self, state_dir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        folder = self._folder = private_folder(state_dir)
        self._clock = clock
        self._recorded: Committed | None = None
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        try:
            with _translated():
                self._connection = _connect(folder / FILE)
                new = registry_schema.is_new(self._connection, folder)
                registry_schema.prepare(self._connection)
                if not new:
                    self._check(self._connection)
                self.cluster_id, self.term = _take_over(self._connection, new)
                sync_folder(folder)
                self._record()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the registry; idempotent."""
        with self._lock, _translated():
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def add_version(self, record: VersionRecord) -> None:
        """Register a version whose folder is stored; idempotent.

        Raises DataLoss if another record has that id and version, InvalidRequest for an origin that is not plain JSON.
        """
        with self._change() as db:
            registry_tables.add_version(db, record)

    def version(self, id: str, version: str) -> VersionRecord:
        """The record of a version. Raises NotFound if it was never registered or was collected."""
        with self._read() as db:
            return registry_tables.find_version(db, id, version)

    def history(self, id: str) -> list[VersionRecord]:
        """All kept versions of an id, oldest first; `epochs` shows which of them served when."""
        with self._read() as db:
            return registry_tables.history(db, id)

    def known(self) -> set[tuple[str, str]]:
        """All kept versions, as (id, version): the folders that a sweep must not remove."""
        with self._read() as db:
            return set(db.execute("SELECT id, version FROM versions"))

    def check_writer(self) -> None:
        """Raise Fenced where another writer has opened the registry since, without changing anything."""
        with self._read() as db:
            self._check_term(db)

    def next_counter(self, id: str) -> int:
        """Allocate the next counter of an id. A number is never reused, even after its version was collected."""
        check_id(id)
        with self._change() as db:
            return registry_tables.take_counter(db, id)

    def current(self) -> EpochRecord | None:
        """The current epoch, or None before the first commit."""
        with self._read() as db:
            return registry_tables.current_epoch(db)

    def epoch(self, number: int) -> EpochRecord:
        """A kept epoch. Raises FailedPrecondition for one that was collected, NotFound for one that never existed."""
        with self._read() as db:
            return registry_tables.find_epoch(db, number)

    def epochs(self) -> list[EpochRecord]:
        """All kept epochs, oldest first."""
        with self._read() as db:
            return registry_tables.all_epochs(db)

    def commit(
        self,
        swap_id: str,
        changes: Mapping[str, str],
        *,
        expect: Mapping[str, str | None],
        declared: Mapping[str, str] | None = None,
        removes: Collection[str] = (),
    ) -> EpochRecord:
        """Create the next epoch from the current one and `changes`, without the ids that it `removes`. Once this
        returns, the swap cannot be undone.

        An expected None says that the id is not there. `declared` are digests of what the configuration declares, by
        id, and are written down with the epoch. The same swap a second time gets the epoch that it made.

        Raises Aborted, with nothing changed, if the current epoch is not as expected or the swap was aborted; NotFound
        for a version that is not registered, or a swap that was not begun;
        FailedPrecondition if the swap has committed other changes. After Unavailable the outcome is unknown until a
        repeated `commit`, or `end_swap`, returns.
        """
        with self._change() as db:
            epoch = self._committed(db, swap_id, changes, expect, declared or {}, removes)
        self._record()
        return epoch

    def _committed(
        self,
        db: sqlite3.Connection,
        swap_id: str,
        changes: Mapping[str, str],
        expect: Mapping[str, str | None],
        declared: Mapping[str, str],
        removes: Collection[str],
    ) -> EpochRecord:
        swap = registry_tables.begun_swap(db, swap_id)
        if swap.state == COMMITTED:
            return registry_tables.made_before(db, swap, changes)
        if swap.state == ABORTED:
            raise Aborted(f"swap {swap_id} was aborted ({swap.message or 'no reason given'}): start another swap")
        current = registry_tables.current_epoch(db)
        before = {} if current is None else current.versions
        registry_tables.check_expected(expect, before)
        kept = {id: version for id, version in before.items() if id not in removes}
        versions = registry_tables.changed(db, kept, changes)
        number = 1 if current is None else current.number + 1
        epoch = EpochRecord(number=number, versions=versions, created=self._clock(), swap_id=swap_id)
        registry_tables.add_epoch(db, epoch)
        registry_tables.set_outcome(db, swap_id, before, changes)
        registry_tables.set_declared(db, declared)
        return epoch

    def begin_swap(self, swap_id: str, plan: Mapping[str, Any]) -> SwapRecord:
        """Record the begin of a swap, before anything is staged for it; returns its record in the journal.

        Versions that `plan` names anywhere, and those registered from now on, are kept until the swap ends. Repeating
        the call with an equal plan changes nothing, even if the swap has ended since: check its state.

        Raises FailedPrecondition if a swap of that id has another plan, InvalidRequest for a bad id or plan.
        """
        check_swap_id(swap_id)
        text = to_json(plan, "the plan of a swap")
        with self._change() as db:
            swap = registry_tables.find_swap(db, swap_id)
            if swap is None:
                registry_tables.begin_swap(db, swap_id, text, self._clock())
            elif to_json(swap.plan, "the plan of a swap") != text:
                raise FailedPrecondition(f"swap id {swap_id} was already used for another plan: use a new swap id")
            return registry_tables.begun_swap(db, swap_id)

    def end_swap(self, swap_id: str, state: str, message: str = "") -> None:
        """Record the end of a swap: "aborted", or the message of one that `commit` has made "committed".

        Raises Aborted if the swap has ended the other way, FailedPrecondition for "committed" without a commit,
        NotFound for a swap that was not begun, InvalidRequest for another state.
        """
        if state not in (COMMITTED, ABORTED):
            raise InvalidRequest(f"a swap ends as {COMMITTED!r} or {ABORTED!r}, not {state!r}")
        text = message[:_MESSAGE_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        with self._change() as db:
            registry_tables.end_swap(db, registry_tables.begun_swap(db, swap_id), state, text, self._clock())

    def swap(self, swap_id: str) -> SwapRecord | None:
        """The record of a swap in the journal, or None."""
        with self._read() as db:
            return registry_tables.find_swap(db, swap_id)

    def open_swaps(self) -> list[SwapRecord]:
        """The swaps that have not ended, oldest first: a restart must abort them."""
        with self._read() as db:
            return registry_tables.open_swaps(db)

    def declared(self, id: str) -> str | None:
        """The digest of what the configuration declared for an id when that was last committed, or None."""
        with self._read() as db:
            row = db.execute("SELECT digest FROM declared WHERE id = ?", (id,)).fetchone()
            return None if row is None else str(row[0])

    def replicas(self) -> dict[str, int]:
        """The numbers of replicas that were asked for, by group of experts."""
        with self._read() as db:
            return registry_tables.replicas(db)

    def set_replicas(self, wanted: Mapping[str, int]) -> None:
        """Keep these numbers of replicas by group, and no others."""
        if wanted != self.replicas():
            with self._change() as db:
                registry_tables.set_replicas(db, wanted)
        self._record()

    def now(self) -> float:
        """Seconds since 1970 by the registry's clock."""
        return self._clock()

    def collect(self, retain_epochs: int, in_use: Collection[tuple[str, str]]) -> list[VersionRecord]:
        """Delete epochs older than the current one and its `retain_epochs` predecessors, and unused versions.

        A version is used if a kept epoch, `in_use` or an open swap names it. Returns the deleted versions, whose
        folders may then be removed; `VersionStore.sweep` finds folders that a crash leaves before that.
        """
        if retain_epochs < 0:
            raise InvalidRequest(f"retain_epochs must be 0 or more, not {retain_epochs}")
        with self._change() as db:
            return registry_tables.collect(db, retain_epochs, in_use)

    def _check(self, db: sqlite3.Connection) -> None:
        """Compare the registry with the files beside it. Raises DataLoss if it has lost what they show."""
        registry_schema.check_folders(db, self._folder)
        try:
            recorded = read_committed(self._folder)
        except DataLoss as error:
            log.warning("%s; it is written again from the registry", error)
            recorded = None
        if recorded is not None:
            check_not_behind(registry_tables.committed(db), recorded)

    def _record(self) -> None:
        """Write what is committed down once more, beside the registry."""
        with self._read() as db:
            committed = registry_tables.committed(db)
            if committed != self._recorded:
                write_committed(self._folder, committed)
                self._recorded = committed

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated():
            if self._connection is None:
                raise FailedPrecondition("the registry is closed: open it again")
            yield self._connection

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction of this writer: all of it becomes durable, or none."""
        with self._read() as db, _transaction(db):
            self._check_term(db)
            yield db

    def _check_term(self, db: sqlite3.Connection) -> None:
        term = registry_schema.meta(db, "term")
        if term != self.term:
            raise Fenced(f"another controller has taken over the registry (term {term}; this one has {self.term})")


def kept_replicas(state_dir: str | os.PathLike[str]) -> dict[str, int]:
    """The numbers of replicas in the registry of a folder that nobody has open; none where there is no registry.

    Raises what opening the registry raises for a file that is damaged or cannot be read.
    """
    return _looked_up(state_dir, registry_tables.replicas, {})


def kept_records(state_dir: str | os.PathLike[str]) -> dict[str, VersionRecord]:
    """The records of what the current epoch names, by id, in the registry of a folder that nobody has open."""
    return _looked_up(state_dir, registry_tables.current_records, {})


def removed_layers(state_dir: str | os.PathLike[str]) -> set[str]:
    """The ids of the layers that were removed by name, in the registry of a folder that nobody has open."""
    return _looked_up(state_dir, registry_tables.removed, set())


def _looked_up(state_dir: str | os.PathLike[str], look: Callable[[sqlite3.Connection], T], nothing: T) -> T:
    path = Path(state_dir) / FILE
    if not path.exists():
        return nothing
    with _translated(), closing(_connect(path)) as db:
        return look(db)


def rebuild(path: Path, committed: Committed, records: Collection[VersionRecord], counters: Mapping[str, int]) -> None:
    """Write a new registry to a file that does not exist: these epochs, the records of their versions, their swaps as
    committed, and counters that go on after the last number of each id.

    Raises Unavailable if the disk fails.
    """
    with _translated(), closing(_connect(path)) as db:
        registry_schema.prepare(db)
        with _transaction(db):
            registry_schema.create(db)
            registry_schema.complete(db)
            registry_tables.restore(db, committed, records, counters)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        raise ConfigError(
            f"cannot open {path} ({error.strerror}): set state_dir to a folder that this user can write to"
        ) from None
    return sqlite3.connect(str(path), timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _take_over(db: sqlite3.Connection, new: bool) -> tuple[str, int]:
    """Become the only writer; returns the cluster's id and the new term."""
    with _transaction(db):
        if new:
            registry_schema.create(db)
        registry_schema.complete(db)
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'term'")
        return str(registry_schema.meta(db, "cluster_id")), int(registry_schema.meta(db, "term"))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


@contextmanager
def _translated() -> Iterator[None]:
    """Translate SQLite's errors: the disk failed, or the file is damaged. All others are bugs and propagate."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if "no such table" in str(error) or "no such column" in str(error):
            raise damaged(str(error)) from None
        raise Unavailable(
            f"the registry cannot be read or written ({error}): check the file system of state_dir"
        ) from None
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:
            raise damaged(str(error)) from None
        raise
