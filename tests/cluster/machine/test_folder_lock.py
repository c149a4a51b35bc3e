"""A folder of results belongs to one process at a time, and to the next one once that has ended, however it did."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.cluster.machine.folder_lock import alone_in
from expertmesh.experts.errors import FailedPrecondition

HOLD = """
import sys, pathlib
from expertmesh.cluster.machine.folder_lock import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    words = (sys.executable, "-c", HOLD, str(folder))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FailedPrecondition, match=f"another process is at work in {folder}"), alone_in(folder):
            raise AssertionError("two have the folder")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with alone_in(folder):
        assert list(folder.iterdir()) == []
