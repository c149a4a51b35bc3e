"""Stored versions: one immutable folder each, written under a temporary name, synced and renamed; and uploads.

versions/<layer>/<expert or gate>/<version>/weights.safetensors    absent for a version without tensors
versions/<layer>/<expert or gate>/<version>/manifest.json          id, version, sha256 and nbytes, and more
uploads/<upload id>                                                sent by clients, not yet part of a version
quarantine/versions/...                                            versions that the registry does not know

A folder under a version's name is always complete: it gets the name last, and loses it first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...experts.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound
from ...experts.names import is_name
from ..machine.durable_files import (
    OWNER_READS,
    copy_file,
    hash_file,
    private_folder,
    sync_file,
    sync_folder,
    write_file,
)
from .records import check_version, is_version

VERSIONS = "versions"
UPLOADS = "uploads"
QUARANTINE = "quarantine"
WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"

_UPLOAD = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)
_EXISTS = (errno.EEXIST, errno.ENOTEMPTY)


def has_versions(state_dir: Path) -> bool:
    """Whether a state folder has version folders, or other files in their place."""
    return any((state_dir / VERSIONS).glob("*/*/*"))


def stored_versions(state_dir: Path, under: str = VERSIONS) -> list[tuple[str, str]]:
    """The (id, version) of every version folder of a state folder, sorted by path."""
    parts = [path.parts[-3:] for path in sorted((state_dir / under).glob("*/*/*"))]
    return [
        (f"{layer}/{name}", version)
        for layer, name, version in parts
        if all(map(is_name, (layer, name))) and is_version(version)
    ]


def quarantine(state_dir: Path, path: Path) -> Path:
    """Move a file or folder of a state folder to the same place under quarantine/; returns where. Raises OSError."""
    target = state_dir / QUARANTINE / path.relative_to(state_dir)
    private_folder(target.parent)
    if target.exists():
        target = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    os.rename(path, target)
    sync_folder(target.parent)
    sync_folder(path.parent)
    return target


class VersionStore:
    """The version folders and uploads of one state folder.

    `clock` returns seconds since 1970. All methods are thread-safe.

    Raises ConfigError if the state folder cannot be created or other users can write to it.
    """

    def __init__(self, state_dir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        root = self._root = private_folder(state_dir)
        self._versions = private_folder(root / VERSIONS)
        self._uploads = private_folder(root / UPLOADS)
        self._clock = clock
        self._writing: set[str] = set()

    def write(
        self, id: str, version: str, source: Path | None, manifest: Mapping[str, Any], *, move: bool = False
    ) -> Path:
        """Store a version durably: its weights file, if any, and the entries of its manifest.

        With `move` the source is consumed, without a copy where the file system supports hard links; if the call fails,
        the source is kept. A version that is already stored stays unchanged if its weights are the same. If `manifest`
        has a "sha256", the weights must match it.

        Raises NotFound if the source is missing, DataLoss for weights other than those declared or stored,
        FailedPrecondition if the file system fails, InvalidRequest for a bad name or manifest.
        """
        target = self._folder(id, version)
        with _disk(f"cannot store {version} of {id}"):
            if target.is_dir():
                self._compare(target, id, version, source, manifest.get("sha256"), move)
            elif source is not None and not source.is_file():
                raise NotFound(f"there is no weights file to store as {version} of {id}")
            else:
                self._create(target, id, version, source, manifest, move)
            for folder in (target.parent, target.parent.parent, self._versions):
                sync_folder(folder)
            if move and source is not None:
                source.unlink(missing_ok=True)
        return target

    def path(self, id: str, version: str) -> Path:
        """The folder of a version. Raises NotFound if it is not stored, InvalidRequest for a bad name."""
        folder = self._folder(id, version)
        if not folder.is_dir():
            raise NotFound(f"{version} of {id} is not stored here: the history of {id} lists what is")
        return folder

    def weights(self, id: str, version: str) -> Path | None:
        """The weights file of a version, or None if it has no tensors.

        Raises NotFound if the version is not stored, DataLoss if its manifest or its weights file is missing.
        """
        file = self.path(id, version) / WEIGHTS
        if self.manifest(id, version)["sha256"] is None:
            return None
        if not file.is_file():
            raise _damaged(id, version, "its weights file is missing")
        return file

    def manifest(self, id: str, version: str) -> dict[str, Any]:
        """The manifest of a version. Raises NotFound, or DataLoss if it is damaged."""
        file = self.path(id, version) / MANIFEST
        try:
            manifest = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict) or (manifest.get("id"), manifest.get("version")) != (id, version):
            raise _damaged(id, version, "its manifest cannot be read")
        if "sha256" not in manifest or "nbytes" not in manifest:
            raise _damaged(id, version, "its manifest has no sha256")
        return manifest

    def verify(self, id: str, version: str) -> None:
        """Check stored weights against their manifest. Raises DataLoss if they differ, NotFound if there are none."""
        manifest = self.manifest(id, version)
        file = self.path(id, version) / WEIGHTS
        try:
            actual = hash_file(file) if file.exists() else (None, 0)
        except OSError as error:
            raise _damaged(id, version, f"its weights cannot be read ({error.strerror})") from None
        if actual != (manifest["sha256"], manifest["nbytes"]):
            raise _damaged(id, version, "its weights differ from those stored")

    def remove(self, id: str, version: str) -> None:
        """Remove a version, if it is stored. Raises FailedPrecondition if the file system fails."""
        folder = self._folder(id, version)
        with _disk(f"cannot remove {version} of {id}"):
            if folder.is_dir():
                _discard(folder)

    def sweep(self, known: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
        """Move every version that is not in `known` (id, version) to quarantine/; interrupted writes, which have no
        version's name yet, and interrupted removals, which have none any more, are removed.

        Returns what was moved. Writes in progress in this process are not touched, but finished ones are: `known` must
        also contain versions that are stored and not yet in the registry.

        Raises FailedPrecondition if the file system fails.
        """
        with _disk("cannot sweep the version folders"):
            for folder in self._versions.glob("*/*/.v*"):
                if folder.name not in self._writing:
                    shutil.rmtree(folder, ignore_errors=True)
            unknown = [stored for stored in stored_versions(self._root) if stored not in known]
            for id, version in unknown:
                quarantine(self._root, self._folder(id, version))
        return unknown

    def upload_path(self, upload_id: str) -> Path:
        """The file of an upload. Raises InvalidRequest for an id that is not a safe file name."""
        if not isinstance(upload_id, str) or not _UPLOAD.fullmatch(upload_id):
            raise InvalidRequest(f"upload id {upload_id!r} must be 1 to 128 letters, digits, '_' or '-'")
        return self._uploads / upload_id

    def uploads_size(self) -> int:
        """The total size of all uploads in bytes, for a quota."""
        return sum(status.st_size for _, status in self._upload_files())

    def drop_stale_uploads(self, seconds: float) -> int:
        """Remove uploads that were not written to for `seconds`; returns how many."""
        oldest = self._clock() - seconds
        stale = [file for file, status in self._upload_files() if status.st_mtime < oldest]
        for file in stale:
            file.unlink(missing_ok=True)
        return len(stale)

    def _upload_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self._uploads.iterdir():
            try:
                yield file, file.lstat()
            except FileNotFoundError:
                continue  # it became a version in the meantime

    def _folder(self, id: str, version: str) -> Path:
        check_version(id, version)
        return self._versions.joinpath(*id.split("/"), version)

    def _create(
        self, target: Path, id: str, version: str, source: Path | None, manifest: Mapping[str, Any], move: bool
    ) -> None:
        for folder in (target.parent.parent, target.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        temporary = target.with_name(f".{version}.{secrets.token_hex(8)}")
        self._writing.add(temporary.name)
        try:
            temporary.mkdir(mode=0o700)
            sha256, nbytes = (None, 0) if source is None else _put(source, temporary / WEIGHTS, move)
            _expect(id, version, sha256, manifest.get("sha256", sha256))
            whole = {**manifest, "id": id, "version": version, "sha256": sha256, "nbytes": nbytes}
            write_file(temporary / MANIFEST, _json(whole, id))
            sync_folder(temporary)
            self._rename(temporary, target, id, version, sha256)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            self._writing.discard(temporary.name)

    def _rename(self, temporary: Path, target: Path, id: str, version: str, sha256: str | None) -> None:
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in _EXISTS:
                raise
            _expect(id, version, sha256, self.manifest(id, version)["sha256"])  # another writer was faster

    def _compare(
        self, target: Path, id: str, version: str, source: Path | None, declared: str | None, move: bool
    ) -> None:
        """Check that the weights to store equal those already stored."""
        stored = self.manifest(id, version)["sha256"]
        if source is None:
            sent = None
        elif move and not source.exists():
            sent = stored if declared is None else declared  # moved by an earlier call that was not acknowledged
        else:
            sent = hash_file(source)[0]
        _expect(id, version, sent, stored)


def _put(source: Path, target: Path, move: bool) -> tuple[str, int]:
    """Copy or link weights to `target`; returns sha256 and bytes. A move links, so the source survives a failure."""
    if not move or source.is_symlink():
        return copy_file(source, target)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return copy_file(source, target)
    target.chmod(OWNER_READS)
    sync_file(target)
    return hash_file(target)


def _discard(folder: Path) -> None:
    """Rename a version's folder, then remove it, so that a reader never sees an incomplete version."""
    renamed = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    os.rename(folder, renamed)
    sync_folder(folder.parent)
    shutil.rmtree(renamed, ignore_errors=True)


def _expect(id: str, version: str, sent: str | None, expected: str | None) -> None:
    if sent != expected:
        raise DataLoss(
            f"the weights sent for {version} of {id} have sha256 {sent}, not {expected}: send the right file again"
        )


def _json(manifest: Mapping[str, Any], id: str) -> bytes:
    try:
        return json.dumps(manifest, indent=1, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the manifest of {id} must be plain JSON values: {error}") from None


def _damaged(id: str, version: str, why: str) -> DataLoss:
    return DataLoss(
        f"the stored {version} of {id} is damaged: {why}; restore the state folder from a backup, or swap {id} again"
    )


@contextmanager
def _disk(what: str) -> Iterator[None]:
    """Translate OSError to FailedPrecondition."""
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(
            f"{what}: {error.strerror or error}; repair the file system of state_dir or free space on it, then retry"
        ) from None
