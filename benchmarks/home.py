"""A home for the clusters of a benchmark: what they write goes with it, and the user's own folder is left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch


@contextmanager
def own_home() -> Iterator[Path]:
    """A temporary EXPERTMESH_HOME for this process and those that it starts."""
    with (
        TemporaryDirectory(prefix="expertmesh-bench-", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, EXPERTMESH_HOME=folder),
    ):
        yield Path(folder)
