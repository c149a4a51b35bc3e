"""Sessions of training that survive a restart: who trains which experts, and their last durable step.

    <state_dir>/training/<session>/session.json       the record
    <state_dir>/training/<session>/<step>.<hex>/<expert>  the state of each expert at a step, and of the caller

A step is written beside the last durable one, and becomes durable by one replacement of the record, which names its
folder: so all experts of a session have the same durable step. Several routers share the folder; a lock of the kernel
keeps them apart.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...experts.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound
from ...experts.protocol import from_mapping
from ..machine.durable_files import private_folder, sync_folder, write_file, write_private

FOLDER = "training"
RECORD = "session.json"
CALLER = ".caller"
"""The file of what the caller saves with a step: no expert has such a name."""

log = logging.getLogger(__name__)
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """A session: `experts` maps the ids that it trains to the versions that they were copied from.

    `holder` says to people who has it; `owner` is the id of the token that opened it. `durable` is its last durable
    step, whose states are in `folder`; `opened_at` is in seconds since 1970. `generation` counts who has taken it up:
    the last one has it. `publishing` is the id of a swap whose outcome has not been noted. `slices` are the numbers of
    slices that passes are computed in, by several replicas; empty where the first one computes all.
    """

    id: str
    layer: str
    experts: dict[str, str]
    holder: str
    owner: str
    opened_at: float
    optimizer: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    durable: int = 0
    folder: str = ""
    generation: int = 0
    publishing: str = ""
    slices: dict[str, int] = field(default_factory=dict)


class TrainingSessions:
    """The sessions in a state folder."""

    def __init__(self, state_dir: str | os.PathLike[str]) -> None:
        self._root = Path(state_dir).absolute() / FOLDER
        self._known: dict[str, tuple[tuple[int, int], SessionRecord]] = {}

    def add(self, record: SessionRecord) -> None:
        """Record a session. Raises FailedPrecondition if another one trains one of its experts, or the disk is full."""
        with self._locked():
            for other in self._all():
                if other.id == record.id and other.owner == record.owner:
                    return  # it was asked for before, and the answer was lost
                if shared := sorted(other.experts.keys() & record.experts.keys()):
                    raise FailedPrecondition(
                        f"{shared[0]} is being trained by {other.holder} (its step {other.durable} is durable): wait "
                        "until that session has ended, or end it by its id, as in training_sessions()"
                    )
            with _told_if_full("the session cannot be recorded"):
                private_folder(self._root / record.id)
                self._write(record)

    def get(self, session_id: str) -> SessionRecord:
        """The record of a session. Raises NotFound, InvalidRequest or DataLoss."""
        if not isinstance(session_id, str) or not _ID.fullmatch(session_id):
            raise InvalidRequest("the id of a session is 32 hexadecimal digits")
        return self._read(session_id)

    def all(self) -> list[SessionRecord]:
        """The records of all sessions, oldest first."""
        return sorted(self._all(), key=lambda record: record.opened_at)

    def rebase(self, session_id: str, versions: Mapping[str, str], publishing: str) -> None:
        """Note that experts of a session have been published as these versions, and the swap that publishes it now.

        Raises InvalidRequest for other experts, and FailedPrecondition if the disk is full.
        """
        with self._locked():
            record = self._read(session_id)
            if unknown := versions.keys() - record.experts.keys():
                raise InvalidRequest(f"{min(unknown)[:64]!r} is no expert of this session")
            with _told_if_full("what is published cannot be noted"):
                self._write(replace(record, experts={**record.experts, **versions}, publishing=publishing))

    def save(self, session_id: str, step: int, states: Mapping[str, bytes], caller: bytes | None) -> int:
        """Make a step durable, with the states of all experts by id; returns the durable step.

        A step before the durable one changes nothing. Raises FailedPrecondition if the disk is full: what was durable
        stays so.
        """
        record = self.get(session_id)
        if step < record.durable:
            return record.durable
        home = self._root / session_id
        folder = home / f"{step}.{secrets.token_hex(8)}"
        with _told_if_full(f"step {step} cannot be saved, and step {record.durable} stays durable"):
            try:
                folder.mkdir(mode=0o700)
                for id, state in states.items():
                    write_file(folder / id.rpartition("/")[2], state)
                if caller is not None:
                    write_file(folder / CALLER, caller)
                sync_folder(folder)
                sync_folder(home)
                self._commit(session_id, step, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return step

    def _commit(self, session_id: str, step: int, folder: Path) -> None:
        with self._locked():
            record = self._read(session_id)
            if step >= record.durable:
                self._write(replace(record, durable=step, folder=folder.name))
            for old in folder.parent.iterdir():  # but not what a repeated request may be writing
                if old.is_dir() and int(old.name.partition(".")[0]) < step:
                    shutil.rmtree(old, ignore_errors=True)

    def take_up(self, session_id: str) -> SessionRecord:
        """Give a session to whoever resumes it: whoever had it before is refused from now on."""
        with self._locked():
            record = self._read(session_id)
            record = replace(record, generation=record.generation + 1)
            self._write(record)
            return record

    def state(self, record: SessionRecord, expert_id: str) -> bytes | None:
        """The state of an expert at the durable step; None before the first one. Raises DataLoss."""
        return self._content(record, expert_id.rpartition("/")[2])

    def caller(self, record: SessionRecord) -> bytes | None:
        """What the caller saved with the durable step, if anything."""
        path = self._root / record.id / record.folder / CALLER
        return path.read_bytes() if record.folder and path.is_file() else None

    def _content(self, record: SessionRecord, name: str) -> bytes | None:
        if not record.folder:
            return None
        try:
            return (self._root / record.id / record.folder / name).read_bytes()
        except OSError as error:
            raise DataLoss(f"the state of {name} at step {record.durable} cannot be read: {error.strerror}") from None

    def remove(self, session_id: str) -> None:
        """End a session and remove its files; idempotent."""
        if not isinstance(session_id, str) or not _ID.fullmatch(session_id):
            raise InvalidRequest("the id of a session is 32 hexadecimal digits")
        with self._locked():
            with suppress(FileNotFoundError):
                (self._root / session_id / RECORD).unlink()
            shutil.rmtree(self._root / session_id, ignore_errors=True)

    def _all(self) -> list[SessionRecord]:
        records = []
        for path in self._root.glob(f"*/{RECORD}") if self._root.is_dir() else ():
            try:
                records.append(self._read(path.parent.name))
            except NotFound:
                continue
            except DataLoss as error:  # one session that is damaged must not hold up the others
                log.error("%s", error.message)
        return records

    def _read(self, session_id: str) -> SessionRecord:
        path = self._root / session_id / RECORD
        try:
            status = path.stat()
            seen = status.st_mtime_ns, status.st_ino  # each record is a file of its own
            known = self._known.get(session_id)
            if known is None or known[0] != seen:
                known = seen, from_mapping(SessionRecord, json.loads(path.read_text(encoding="utf-8")))
                self._known[session_id] = known
            return known[1]
        except FileNotFoundError:
            self._known.pop(session_id, None)
            raise NotFound("there is no such session of training: it was aborted, or is of another cluster") from None
        except (OSError, ValueError, InvalidRequest) as error:
            raise DataLoss(f"the record of a session, {path}, cannot be read: {error}") from None

    def _write(self, record: SessionRecord) -> None:
        path = self._root / record.id / RECORD
        write_private(path, json.dumps(asdict(record)))
        sync_folder(path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        private_folder(self._root)
        lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@contextmanager
def _told_if_full(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FailedPrecondition(f"{what}: {reason}; free disk space on the file system of state_dir") from None
