"""Private files and folders that survive a crash: hashed copies, and the syncs that make a rename durable."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...experts.errors import ConfigError

CHUNK = 1 << 20
OWNER_READS = 0o400


def private_folder(path: str | os.PathLike[str], setting: str = "state_dir") -> Path:
    """A folder for this user alone; it and missing parents are created durably, with mode 0700.

    Raises a ConfigError that names `setting` if the folder cannot be created, or if others could write into it.
    """
    folder = Path(path).absolute()
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        for part in reversed(missing):
            part.mkdir(mode=0o700, exist_ok=True)
            sync_folder(part.parent)
    except OSError as error:
        raise ConfigError(f"cannot create {folder} ({error.strerror}): set {setting} to another folder") from None
    check_private(folder, setting)
    return folder


def check_private(folder: Path, setting: str) -> None:
    """Check that a folder exists and only this user can write into it. Raises a ConfigError that names `setting`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: set {setting} to another path")
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(f"others can write into {folder}: chmod 700 {folder}, or set {setting} to another folder")


def sync_file(path: Path) -> None:
    """Flush a file's content to disk. Raises OSError."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk. Raises OSError."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def write_file(path: Path, data: bytes) -> None:
    """Write a new read-only file and flush it to disk. Raises OSError."""
    with _new(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_private(path: Path, text: str) -> None:
    """Write a private file of text, as `write_private_bytes`."""
    write_private_bytes(path, text.encode())


def write_private_bytes(path: Path, data: bytes) -> None:
    """Write a private file atomically: it replaces an existing one, and a reader never sees part of it.

    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _new(temporary, 0o600) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_file(source: Path, target: Path) -> tuple[str, int]:
    """Copy a file to a new read-only one and flush it to disk; returns the sha256 in hex and the bytes written.

    Raises OSError.
    """
    digest, nbytes = hashlib.sha256(), 0
    with _new(target) as file:
        for chunk in _chunks(source):
            file.write(chunk)
            digest.update(chunk)
            nbytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), nbytes


def hash_file(path: Path) -> tuple[str, int]:
    """The sha256 of a file in hex, and its size in bytes. Raises OSError."""
    digest, nbytes = hashlib.sha256(), 0
    for chunk in _chunks(path):
        digest.update(chunk)
        nbytes += len(chunk)
    return digest.hexdigest(), nbytes


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _new(path: Path, mode: int = OWNER_READS) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
