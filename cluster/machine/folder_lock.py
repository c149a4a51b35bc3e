"""One process at a time in a folder of results: a lock of the kernel on the folder itself, of which nothing is left."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...experts.errors import FailedPrecondition


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and hold it for a block. Raises FailedPrecondition while another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(f"another process is at work in {folder}: wait for it, or stop it") from None
        yield
    finally:
        os.close(held)
