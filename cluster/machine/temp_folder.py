"""The folder for the temporary files of one run: this user's alone, with room for sockets under it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...experts.errors import ConfigError

PREFIX = "expertmesh-"
MOST_BASE_BYTES = 19
"""How long the path may be in which the folder is made.

The system takes 107 bytes as the name of a socket, and Ray appends up to 64: its session and the name of a socket.
"""


def new_run_folder() -> Path:
    """Make a folder with mode 0700, in TMPDIR or, if its path is too long, in /tmp. Raises ConfigError."""
    bases = (tempfile.gettempdir(), "/tmp")
    short = (base for base in bases if len(os.fsencode(base)) <= MOST_BASE_BYTES)
    usable = [base for base in short if os.access(base, os.W_OK | os.X_OK)]
    if not usable:
        raise ConfigError(
            f"{bases[0]} is too long for the sockets of Ray, and /tmp cannot be written: set TMPDIR to a folder whose "
            f"path has at most {MOST_BASE_BYTES} characters"
        )
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=usable[0]))


def run_folder_of(folder: str) -> Path:
    """The folder of the run in which a folder lies; one that lies in none stands for itself."""
    parent = Path(folder).parent
    return parent if parent.name.startswith(PREFIX) else Path(folder)
