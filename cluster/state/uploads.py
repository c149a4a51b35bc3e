"""Uploads: weights that clients send in chunks, kept as files until a version uses them or they expire.

Sending a chunk twice changes nothing, and each reply names the next byte expected. So a client can resume after a lost
reply, a restart of the router, or the removal of its file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...experts.errors import DataLoss, FailedPrecondition, TooLarge
from ..machine.durable_files import hash_file
from ..rpc.swaps import UploadChunk, UploadState
from .version_folders import VersionStore

STALE_SECONDS = 3600.0
TIDY_SECONDS = 60.0
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """The maximum size of one upload, and of all uploads together, in bytes.

    `upload_rate` limits each upload, in bytes per second, while requests are in flight: receiving, writing and hashing
    chunks takes CPU time from them.
    """

    max_upload_bytes: int = 8 * 2**30
    max_uploads_bytes: int = 16 * 2**30
    upload_rate: int = 64 * 2**20


class Uploads:
    """The uploads of one state folder. Every method may be called from any thread; `clock` is in monotonic seconds."""

    def __init__(
        self, store: VersionStore, limits: UploadLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or UploadLimits()
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._tidied = clock()
        self._hashes: dict[str, tuple[int, Any]] = {}

    def write(self, chunk: UploadChunk, data: bytes | memoryview) -> UploadState:
        """Write a chunk, unless its bytes were written before or would leave a gap.

        Raises InvalidRequest, TooLarge above a limit, DataLoss if the complete upload has another sha256 (it is then
        dropped), FailedPrecondition if the file system fails.
        """
        chunk.check(len(data))
        with self._lock:
            path = self._store.upload_path(chunk.upload_id)
            try:
                return self._write(path, chunk, data)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise FailedPrecondition(
                    f"the upload cannot be written: {reason}; free disk space on the file system of state_dir"
                ) from None

    def path(self, upload_id: str) -> Path:
        """The file of an upload, which may not be complete. Raises InvalidRequest."""
        return self._store.upload_path(upload_id)

    def discard(self, upload_id: str) -> None:
        """Drop an upload, if it exists."""
        with self._lock:
            self._hashes.pop(upload_id, None)
            self._store.upload_path(upload_id).unlink(missing_ok=True)

    def is_untidy(self) -> bool:
        """Whether it is time to `tidy`: once a minute."""
        return self._clock() - self._tidied >= TIDY_SECONDS

    def tidy(self) -> None:
        """Drop uploads without a new chunk for an hour."""
        with self._lock:
            self._tidied = self._clock()
            self._store.drop_stale_uploads(STALE_SECONDS)
            self._hashes = {id: known for id, known in self._hashes.items() if self._store.upload_path(id).exists()}

    def _write(self, path: Path, chunk: UploadChunk, data: bytes | memoryview) -> UploadState:
        size = path.stat().st_size if path.exists() else 0
        if size > chunk.total:
            raise DataLoss(f"{size} bytes of this upload have arrived, more than its {chunk.total}: send it again")
        if chunk.offset == size and (len(data) or not path.exists()):
            self._check_room(chunk, size, len(data))
            with os.fdopen(os.open(path, _APPEND, 0o600), "ab") as file:
                file.write(data)
            self._hash(chunk, size, data)
            size += len(data)
        done = chunk.last and size == chunk.total
        if done:
            self._check_sum(path, chunk)
        return UploadState(next=size, done=done)

    def _check_room(self, chunk: UploadChunk, size: int, nbytes: int) -> None:
        limits = self.limits
        if chunk.total > limits.max_upload_bytes:
            raise TooLarge(
                f"the upload has {chunk.total} bytes; max_upload_bytes is {limits.max_upload_bytes}: raise it in the "
                "cluster's configuration, or send a smaller file"
            )
        needed = chunk.total if size == 0 else nbytes
        if self._store.uploads_size() + needed > limits.max_uploads_bytes:
            raise TooLarge(
                f"there is no room for {needed} more bytes of uploads; max_uploads_bytes is "
                f"{limits.max_uploads_bytes}: finish or wait for other uploads, or raise it in the configuration"
            )

    def _hash(self, chunk: UploadChunk, size: int, data: bytes | memoryview) -> None:
        """Update the running sha256, so that a large file is not read again once it is complete."""
        hashed, running = self._hashes.pop(chunk.upload_id, (0, hashlib.sha256()))
        if hashed == size:
            running.update(data)
            self._hashes[chunk.upload_id] = (size + len(data), running)

    def _check_sum(self, path: Path, chunk: UploadChunk) -> None:
        hashed, running = self._hashes.pop(chunk.upload_id, (-1, None))
        digest = running.hexdigest() if running is not None and hashed == chunk.total else hash_file(path)[0]
        if digest != chunk.sha256:
            path.unlink(missing_ok=True)
            raise DataLoss(
                f"the upload has sha256 {digest[:12]}..., but the sender's is {chunk.sha256[:12]}...: send it again"
            )
