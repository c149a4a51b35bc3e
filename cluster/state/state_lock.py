"""One cluster per state folder: the lock on it, which names its holder.

A holder on this machine is known by the kernel's lock on the file, which falls with its process. What another machine
has written there can only be believed: file systems over a network may not share kernel locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from ...experts.errors import ConfigError, FailedPrecondition
from ..machine.durable_files import private_folder

LOCK = "state.lock"
BOOT = Path("/proc/sys/kernel/random/boot_id")


class StateLock:
    """The lock that this process has on a state folder."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def close(self) -> None:
        """Give the folder back; idempotent."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


def hold_state(state_dir: Path, holder: str) -> StateLock:
    """Lock a state folder for this process; `holder` says for what, to whoever is refused.

    The end of the process releases it, too. Raises FailedPrecondition while another process of this machine holds it,
    or where one of another machine has not given it back; ConfigError for a folder that cannot be used.
    """
    folder = private_folder(state_dir)
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot open {folder / LOCK} ({error.strerror}): set state_dir to a folder that this user can write to"
        ) from None
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        _lock(folder, file)
        here = {"holder": holder, "pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": _now()}
        file.truncate(0)
        file.seek(0)
        file.write(json.dumps(here).encode())
        os.fsync(file.fileno())
    except BaseException:
        file.close()
        raise
    return StateLock(file)


@contextmanager
def lock_state(state_dir: Path, holder: str) -> Iterator[None]:
    """Hold a state folder for as long as the block runs. Raises what `hold_state` raises."""
    lock = hold_state(state_dir, holder)
    try:
        yield
    finally:
        lock.close()


def _lock(folder: Path, file: IO[bytes]) -> None:
    found = _read(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FailedPrecondition(
            f"state_dir {folder} is in use{_by(found)}: stop that one, or set another state_dir"
        ) from None
    except OSError as error:
        raise ConfigError(f"state_dir {folder} cannot be locked ({error.strerror}): set another folder") from None
    found = _read(file)
    if found and found.get("boot") != _boot() and found.get("host") != socket.gethostname():
        raise FailedPrecondition(
            f"state_dir {folder} is in use{_by(found)}, or was when that machine failed: another machine cannot tell. "
            f"Stop it there, or if it is certainly dead, remove {folder / LOCK}"
        )


def _read(file: IO[bytes]) -> Mapping[str, object]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _by(found: Mapping[str, object]) -> str:
    if not found:
        return ""
    return f" by {found.get('holder')} (pid {found.get('pid')} on {found.get('host')}, since {found.get('since')})"


def _boot() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
