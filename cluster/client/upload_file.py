"""A file on the client's side that is sent piece by piece, without ever being in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...experts.errors import DataLoss, NotFound
from ..machine.durable_files import hash_file


@dataclass(frozen=True)
class LocalFile:
    """A file by its path; what cannot be read raises NotFound with the path, which is the caller's own."""

    path: Path

    def size(self) -> int:
        """Its bytes."""
        with self._opened() as file:
            return os.fstat(file.fileno()).st_size

    def sha256(self) -> bytes:
        """Its sha256, as 32 bytes."""
        with self._opened():
            return bytes.fromhex(hash_file(self.path)[0])

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes. Raises DataLoss where there are fewer now."""
        with self._opened() as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise DataLoss(f"{self.path} became shorter while it was sent: is it still being written?")
        return data

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise NotFound(f"cannot read {self.path}: {error.strerror or type(error).__name__}") from None
