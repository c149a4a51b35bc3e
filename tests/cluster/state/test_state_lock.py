"""The lock on a state folder: one holder, named to all others; the dead of this machine hold nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.cluster.state.state_lock import LOCK, hold_state
from expertmesh.experts.errors import ConfigError, FailedPrecondition

HOLDER = """
import sys, time
from expertmesh.cluster.state.state_lock import hold_state
lock = hold_state(sys.argv[1], "cluster 'a'")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def left_by(folder: Path, **more: object) -> None:
    """A lock that another process has not given back."""
    folder.mkdir(mode=0o700, exist_ok=True)
    there = {"holder": "cluster 'b'", "pid": 7, "host": "elsewhere", "boot": "another", "since": "long ago"}
    (folder / LOCK).write_text(json.dumps(there | more))


def test_a_second_holder_is_refused_and_told_who_has_it(folder: Path) -> None:
    lock = hold_state(folder, "cluster 'a'")
    with pytest.raises(FailedPrecondition, match=f"in use by cluster 'a' \\(pid {os.getpid()} on .*another state_dir"):
        hold_state(folder, "cluster 'b'")
    lock.close()
    lock.close()
    hold_state(folder, "cluster 'b'").close()


def test_another_way_to_the_same_folder_is_the_same_folder(folder: Path, tmp_path: Path) -> None:
    lock = hold_state(folder, "cluster 'a'")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FailedPrecondition):
        hold_state(tmp_path / "link", "cluster 'b'")
    lock.close()


def test_a_killed_process_holds_nothing(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FailedPrecondition, match=f"pid {process.pid} "):
        hold_state(folder, "cluster 'b'")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    hold_state(folder, "cluster 'b'").close()


def test_the_lock_of_another_machine_is_believed_until_it_is_removed(folder: Path) -> None:
    left_by(folder)
    with pytest.raises(FailedPrecondition, match=r"cluster 'b' \(pid 7 on elsewhere.*dead, remove .*state\.lock"):
        hold_state(folder, "cluster 'a'")
    assert "elsewhere" in (folder / LOCK).read_text()
    (folder / LOCK).unlink()
    hold_state(folder, "cluster 'a'").close()


@pytest.mark.parametrize("here", ["host", "boot"])
def test_a_lock_from_before_a_reboot_or_from_another_container_is_taken(folder: Path, here: str) -> None:
    hold_state(folder, "x")  # what this machine writes
    own = json.loads((folder / LOCK).read_text())
    left_by(folder, **{here: own[here]})
    hold_state(folder, "cluster 'a'").close()


def test_a_lock_file_that_says_nothing_is_taken(folder: Path) -> None:
    left_by(folder)
    (folder / LOCK).write_text("{")
    hold_state(folder, "cluster 'a'").close()


def test_a_lock_that_cannot_be_opened_names_the_setting(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="set state_dir"):
        hold_state(folder, "cluster 'a'")
    assert not (tmp_path / "elsewhere").exists()
