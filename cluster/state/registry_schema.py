"""The registry's file: creates its tables, and refuses a file that is damaged, of another schema, or foreign."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

from ...experts.errors import FailedPrecondition, Unavailable
from .committed import COMMITTED_FILE
from .records import counter_of, damaged
from .version_folders import has_versions, stored_versions

SCHEMA = 2
"""2: the digest of a version is computed from the digests of its tensors."""
APPLICATION = 0x45584D52  # "EXMR"

_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL)",
    "CREATE TABLE counters (id TEXT PRIMARY KEY, last INTEGER NOT NULL)",
    "CREATE TABLE versions (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, version TEXT NOT NULL,"
    " counter INTEGER NOT NULL, record TEXT NOT NULL, UNIQUE (id, version))",
    "CREATE TABLE epochs (number INTEGER PRIMARY KEY, created REAL NOT NULL, swap_id TEXT NOT NULL UNIQUE,"
    " versions TEXT NOT NULL)",
    # since: the newest version when the swap began
    "CREATE TABLE swaps (seq INTEGER PRIMARY KEY AUTOINCREMENT, swap_id TEXT NOT NULL UNIQUE, state TEXT NOT NULL,"
    " plan TEXT NOT NULL, begun REAL NOT NULL, ended REAL, epoch INTEGER, message TEXT NOT NULL,"
    " since INTEGER NOT NULL)",
    "CREATE TABLE declared (id TEXT PRIMARY KEY, digest TEXT NOT NULL)",
)

_REPLICAS = "CREATE TABLE IF NOT EXISTS replicas (id TEXT PRIMARY KEY, wanted INTEGER NOT NULL)"

_OUTCOMES = (  # outlives the epoch of a swap, so that who asks again gets the same answer
    "CREATE TABLE IF NOT EXISTS outcomes (swap_id TEXT PRIMARY KEY, before TEXT NOT NULL, after TEXT NOT NULL)"
)


class Database(Protocol):
    """Executes SQL."""

    def execute(self, sql: str, parameters: tuple[object, ...] = ..., /) -> Any:
        """Execute one statement; returns a cursor over its rows."""


def is_new(db: Database, folder: Path) -> bool:
    """Whether the file is still empty.

    Raises DataLoss if it is not a registry, or empty where versions are stored; FailedPrecondition for another schema.
    """
    application, schema = _pragma(db, "application_id"), _pragma(db, "user_version")
    (objects,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if (application, schema, objects) == (0, 0, 0):
        if has_versions(folder) or (folder / COMMITTED_FILE).exists():
            raise damaged("it is empty or was removed, but stored versions exist")
        return True
    if application != APPLICATION:
        raise damaged("it is another program's database")
    if schema > SCHEMA:
        raise FailedPrecondition(
            f"the registry in {folder} was written by a newer expertmesh (schema {schema}; this one reads {SCHEMA}): "
            "install that version again, or set state_dir to another folder"
        )
    if schema < SCHEMA:
        raise FailedPrecondition(
            f"the registry in {folder} was written by an older expertmesh (schema {schema}; this one reads {SCHEMA}), "
            "which named versions differently: set state_dir to another folder, and swap in the weights to keep from "
            f"{folder}/versions"
        )
    return False


def prepare(db: Database) -> None:
    """Make every commit durable, and check the file's integrity.

    Commits go into the file itself, not into a write-ahead log: SQLite takes a damaged page of such a log for its end,
    and goes back to the state before it without an error. Raises DataLoss for a damaged file.
    """
    if db.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
        raise Unavailable("the registry is in use by another process: stop that, or retry in a moment")
    db.execute("PRAGMA synchronous = EXTRA")
    (problem,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != "ok":
        raise damaged(" ".join(str(problem).split()))


def check_folders(db: Database, folder: Path) -> None:
    """Raise DataLoss if a version is stored whose counter the registry never gave out: then it has lost changes."""
    last = dict(db.execute("SELECT id, last FROM counters"))
    for id, version in stored_versions(folder):
        if counter_of(version) > last.get(id, 0):
            raise damaged(f"{version} of {id} is stored, but the last one that it knows is v{last.get(id, 0)}")


def create(db: Database) -> None:
    """Create the tables, unless another process just did."""
    if _pragma(db, "user_version"):
        return
    for statement in _TABLES:
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('cluster_id', ?), ('term', 0)", (str(uuid.uuid4()),))
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")


def complete(db: Database) -> None:
    """Add what an earlier build of the same schema did not have."""
    db.execute("INSERT OR IGNORE INTO meta VALUES ('replicas', 0)")
    db.execute(_OUTCOMES)
    db.execute(_REPLICAS)


def has_replicas(db: Database) -> bool:
    """Whether the table of replicas is there: an earlier build of the same schema has none."""
    return bool(db.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'replicas'").fetchone()[0])


def meta(db: Database, key: str) -> Any:
    """A value of the registry itself. Raises DataLoss if it is missing."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise damaged(f"it has no {key}")
    return row[0]


def _pragma(db: Database, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
