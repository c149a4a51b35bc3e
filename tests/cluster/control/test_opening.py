"""A controller whose registry could not be opened is opened later: each asker is told why, and tries are rare."""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from pathlib import Path

import pytest

from expertmesh.cluster.control import controller as product
from expertmesh.cluster.control.controller import open_controller
from expertmesh.cluster.control.opening import LONGEST_WAIT, Opening
from expertmesh.cluster.control.ports import StateSettings
from expertmesh.experts.errors import DataLoss, FailedPrecondition, Unavailable


class Disk:
    """A disk that is full at first; it counts the tries."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tries = 0
        self.full = True

    def open(self) -> str:
        self.tries += 1
        if self.full:
            raise Unavailable("the disk is full")
        return "opened"


def test_what_failed_once_is_tried_again_and_then_stays_open() -> None:
    disk = Disk()
    opening = Opening(disk.open, lambda: disk.now)
    for _ in range(3):
        with pytest.raises(Unavailable, match="the disk is full"):
            opening.get()
    assert (disk.tries, opening.problem, opening.opened) == (1, "the disk is full", None)
    disk.full = False
    with pytest.raises(Unavailable):
        opening.get()
    disk.now = 1.0
    assert opening.get() == opening.get() == opening.opened == "opened"
    assert (disk.tries, opening.problem) == (2, "")


def test_tries_become_rare_but_never_end() -> None:
    disk = Disk()
    opening = Opening(disk.open, lambda: disk.now)
    tried = []
    for second in range(100):
        disk.now, before = float(second), disk.tries
        with pytest.raises(Unavailable):
            opening.get()
        tried += [second] * (disk.tries - before)
    assert tried[:5] == [0, 1, 3, 7, 15]
    assert {later - sooner for sooner, later in pairwise(tried[4:])} == {LONGEST_WAIT}


def test_the_kind_of_the_error_is_told_each_time() -> None:
    def refuse() -> None:
        raise DataLoss("damaged")

    opening = Opening(refuse, lambda: 0.0)
    for _ in range(2):
        with pytest.raises(DataLoss, match="damaged"):
            opening.get()


def test_a_controller_that_fails_half_opened_lets_go_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, state_dir: str) -> None:
            raise FailedPrecondition("the disk is full")

    settings = StateSettings(state_dir=str(tmp_path / "state"), retain_epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(product, "VersionStore", Full)
        with pytest.raises(FailedPrecondition, match="full"):
            open_controller(settings, None, None)  # type: ignore[arg-type]
    with sqlite3.connect(tmp_path / "state" / "registry.sqlite", timeout=0) as db:
        db.execute("BEGIN EXCLUSIVE")
        db.execute("ROLLBACK")
    open_controller(settings, None, None).close()  # type: ignore[arg-type]
