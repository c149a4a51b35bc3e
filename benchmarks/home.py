"""A home for the clusters of a benchmark: what they write goes with it, and the user's own folder is left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLE = "EXPERTMESH_HOME"


@contextmanager
def own_home() -> Iterator[Path]:
    """A temporary EXPERTMESH_HOME for this process and those that it starts."""
    before = os.environ.get(VARIABLE)
    with TemporaryDirectory(prefix="expertmesh-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = before
