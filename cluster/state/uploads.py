"""Uploads: weights that clients send in chunks, kept as files until a version takes them or nobody does.

A chunk that was sent twice changes nothing, and the answer to each says which byte comes next; so a client goes on
after a lost answer, a router that restarted, or a file that was dropped meanwhile.
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
    """Bytes that one upload, and all uploads together, may have.

    `upload_rate` is how many bytes a second each upload may bring at most while requests are served: receiving, writing
    and hashing them takes processor time that requests would wait for.
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
        """Take a chunk; bytes that are there already, or that would leave a gap, are not written.

        Raises InvalidRequest, TooLarge above a limit, DataLoss where the whole has another sha256 (and is dropped),
        FailedPrecondition when the disk refuses.
        """
        chunk.check(len(data))
        with self._lock:
            path = self._store.upload_path(chunk.upload_id)
            try:
                return self._write(path, chunk, data)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise FailedPrecondition(
                    f"the upload cannot be written: {reason}; clear the disk of state_dir"
                ) from None

    def discard(self, upload_id: str) -> None:
        """Drop an upload; one that is not there is no error."""
        with self._lock:
            self._hashes.pop(upload_id, None)
            self._store.upload_path(upload_id).unlink(missing_ok=True)

    def is_untidy(self) -> bool:
        """Whether it is time to `tidy`: once a minute."""
        return self._clock() - self._tidied >= TIDY_SECONDS

    def tidy(self) -> None:
        """Drop uploads that nobody has written to for an hour."""
        with self._lock:
            self._tidied = self._clock()
            self._store.drop_stale_uploads(STALE_SECONDS)
            self._hashes = {id: known for id, known in self._hashes.items() if self._store.upload_path(id).exists()}

    def _write(self, path: Path, chunk: UploadChunk, data: bytes | memoryview) -> UploadState:
        there = path.stat().st_size if path.exists() else 0
        if there > chunk.total:
            raise DataLoss(f"{there} bytes of this upload are here already, more than its {chunk.total}: send it anew")
        if chunk.offset == there and (len(data) or not path.exists()):
            self._check_room(chunk, there, len(data))
            with os.fdopen(os.open(path, _APPEND, 0o600), "ab") as file:
                file.write(data)
            self._hash(chunk, there, data)
            there += len(data)
        done = chunk.last and there == chunk.total
        if done:
            self._check_sum(path, chunk)
        return UploadState(next=there, done=done)

    def _check_room(self, chunk: UploadChunk, there: int, nbytes: int) -> None:
        limits = self.limits
        if chunk.total > limits.max_upload_bytes:
            raise TooLarge(
                f"the upload has {chunk.total} bytes, max_upload_bytes is {limits.max_upload_bytes}: raise it in the "
                "cluster's configuration, or send less"
            )
        needed = chunk.total if there == 0 else nbytes
        if self._store.uploads_size() + needed > limits.max_uploads_bytes:
            raise TooLarge(
                f"there is no room for {needed} more bytes of uploads, max_uploads_bytes is "
                f"{limits.max_uploads_bytes}: finish or wait for other uploads, or raise it in the configuration"
            )

    def _hash(self, chunk: UploadChunk, there: int, data: bytes | memoryview) -> None:
        """Go on with the running sha256, which spares reading a large file again at its end."""
        reached, running = self._hashes.pop(chunk.upload_id, (0, hashlib.sha256()))
        if reached == there:
            running.update(data)
            self._hashes[chunk.upload_id] = (there + len(data), running)

    def _check_sum(self, path: Path, chunk: UploadChunk) -> None:
        reached, running = self._hashes.pop(chunk.upload_id, (-1, None))
        found = running.hexdigest() if running is not None and reached == chunk.total else hash_file(path)[0]
        if found != chunk.sha256:
            path.unlink(missing_ok=True)
            raise DataLoss(
                f"what arrived has sha256 {found[:12]}..., the sender's is {chunk.sha256[:12]}...: send it again"
            )
