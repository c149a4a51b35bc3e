"""The folder of a run is private, and its path leaves room for sockets, whatever TMPDIR is."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from expertmesh.cluster.machine.temp_folder import MOST_BASE_BYTES, new_run_folder, run_folder_of
from expertmesh.experts.errors import ConfigError

SESSION = "session_2026-11-27_09-12-54_123456_4194304/sockets/plasma_store"


@pytest.mark.parametrize("length", [0, 40, 80])
def test_a_socket_of_ray_fits_under_any_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    base = tempfile.gettempdir() if not length else str(tmp_path / ("x" * length))
    os.makedirs(base, exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", base)
    folder = new_run_folder()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(os.fsencode(folder / "ray" / SESSION)) <= 107
        assert (str(folder.parent) == base) == (len(base) <= MOST_BASE_BYTES)
        assert run_folder_of(str(folder / "ray")) == folder
    finally:
        shutil.rmtree(folder)


def test_without_a_short_folder_the_error_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 40)))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=f"set TMPDIR to a folder whose path has at most {MOST_BASE_BYTES}"):
        new_run_folder()


def test_a_folder_outside_of_a_run_stands_for_itself() -> None:
    assert run_folder_of("/tmp/ray") == Path("/tmp/ray")
