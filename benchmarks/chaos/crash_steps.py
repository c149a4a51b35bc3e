"""The steps of a swap at which a controller can be made to die, and the file that says so."""

from __future__ import annotations

from pathlib import Path

JOURNALLED = "after begin: the swap is in the journal"
STAGING = "during staging: the first receipt is there"
READY = "before commit: all receipts are there"
STORED = "before commit: the first version is on disk"
COMMITTED = "after commit, before the flip"
FLIPPED = "after the flip, before the answer"
RETIRING = "while retiring: before the first unload"

STEPS = (JOURNALLED, STAGING, READY, STORED, COMMITTED, FLIPPED, RETIRING)
AFTER_COMMIT = (COMMITTED, FLIPPED, RETIRING)
"""Where the swap is durable already, so that it must survive."""


def crash_file(state_dir: str | Path) -> Path:
    """The file that names the step to die at; it is gone when that has happened."""
    return Path(f"{state_dir}.crash")
