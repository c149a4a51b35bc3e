"""Uploads of weights files as flows without sockets: read and sent in chunks, never in memory as a whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...experts.errors import DataLoss, ExpertMeshError, InvalidRequest, NotFound, Unavailable
from ...experts.wire import Frame, WireTensor
from ..machine.durable_files import hash_file
from ..rpc.documents import decode_document
from ..rpc.swaps import CHUNK_BYTES, DATA, UploadState, read_answer
from .retry import Flow, Work

Progress = Callable[[str, int, int], None]
"""Called as an upload proceeds: the id, the bytes that have arrived, and the total."""

Send = Callable[[dict[str, Any], dict[str, WireTensor]], Flow[Frame]]
"""Sends one chunk: its fields and its bytes."""

FRAME_BYTES = 4096
STALLS = 5


@dataclass(frozen=True)
class Upload:
    """A file to send, and the id of its upload."""

    upload_id: str
    file: LocalFile
    total: int
    sha256: str

    def send(self, id: str, send: Send, max_message_bytes: int, progress: Progress | None) -> Flow[None]:
        """Send the file in chunks, each from the offset that the server requests. Repeating a chunk is harmless.

        Raises NotFound, DataLoss, Unavailable if the server accepts no more bytes, and the errors of `send`.
        """
        chunk, offset, stalls = min(CHUNK_BYTES, max_message_bytes - FRAME_BYTES), 0, 0
        while True:
            state = yield from self._send_chunk(offset, max(0, min(chunk, self.total - offset)), send)
            if progress is not None:
                progress(id, state.next, self.total)
            if state.done:
                return
            stalls = 0 if state.next > offset else stalls + 1
            if stalls > STALLS or not 0 <= state.next <= self.total:
                raise Unavailable(f"the upload of {self.file.path.name} makes no progress: try again in a moment")
            offset = state.next

    def _send_chunk(self, offset: int, size: int, send: Send) -> Flow[UploadState]:
        data = yield from _run_work(partial(self.file.read, offset, size))
        last = offset + size == self.total
        fields = {
            "upload_id": self.upload_id,
            "offset": offset,
            "total": self.total,
            "sha256": self.sha256,
            "last": last,
        }
        frame = yield from send(fields, {DATA: WireTensor("uint8", (size,), data)})
        return read_answer(UploadState, decode_document(frame, "uploaded"))


def prepare(id: str, path: object) -> Flow[Upload]:
    """Prepare the upload of a file for an id: read its size and sha256. Raises InvalidRequest or NotFound."""
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidRequest(f"{id}: pass the path of a safetensors file, not {path!r}")
    file = LocalFile(Path(path))
    total = file.size()
    sha256 = yield from _run_work(file.sha256)
    return Upload(uuid.uuid4().hex, file, total, sha256.hex())


def with_file_names(error: ExpertMeshError, uploads: Iterable[Upload]) -> ExpertMeshError:
    """The error with file names in place of upload ids, which mean nothing to the caller."""
    for upload in uploads:
        error.message = error.message.replace(upload.upload_id, upload.file.path.name)
    error.args = (error.message,)
    return error


@dataclass(frozen=True)
class LocalFile:
    """A file by its path. Methods raise NotFound with the path if it cannot be read."""

    path: Path

    def size(self) -> int:
        """The size of the file in bytes."""
        with self._opened() as file:
            return os.fstat(file.fileno()).st_size

    def sha256(self) -> bytes:
        """The sha256 of the file, 32 bytes."""
        with self._opened():
            return bytes.fromhex(hash_file(self.path)[0])

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset`. Raises DataLoss if the file has become too short."""
        with self._opened() as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise DataLoss(f"{self.path} became shorter while it was sent: is another process still writing it?")
        return data

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise NotFound(f"cannot read {self.path}: {error.strerror or type(error).__name__}") from None


def _run_work(action: Callable[[], bytes]) -> Flow[bytes]:
    """Run an action as `Work` and return its result."""
    answer = yield Work(action)
    if not isinstance(answer, bytes):
        raise ExpertMeshError("a piece of work ended without a result")
    return answer
