"""What a serving process does about itself."""

from __future__ import annotations

import gc
import sys

from expertmesh.cluster.machine.process_tuning import settle, take_turns_often


def test_settled_objects_are_not_looked_at_again() -> None:
    kept = [{} for _ in range(1000)]
    before = gc.get_freeze_count()
    settle()
    try:
        assert gc.get_freeze_count() >= before + len(kept)
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_threads_take_turns_often() -> None:
    before = sys.getswitchinterval()
    try:
        take_turns_often()
        assert sys.getswitchinterval() < 0.001
    finally:
        sys.setswitchinterval(before)
