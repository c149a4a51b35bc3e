"""Modules beside a configuration are found, as `python file.py` finds those beside the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .yaml_file import others_can_write

VARIABLE = "PYTHONPATH"


def put_on_path(folder: Path) -> bool:
    """Look for modules in a folder before any other, here and in the processes that are started from here.

    False, and nothing done, for a folder in which other users can place files: their code would be run.
    """
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or others_can_write(status):
        return False
    place = str(folder)
    inherited = os.environ.get(VARIABLE, "").split(os.pathsep)
    if place not in sys.path:
        sys.path.insert(0, place)
    if place not in inherited:
        os.environ[VARIABLE] = os.pathsep.join(filter(None, [place, *inherited]))
    return True
