"""What the load asks for is carried out once, one call after another, and a failure ends nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from helpers.waiting import eventually

from expertmesh.cluster.owner.following_load import FollowsLoad
from expertmesh.experts.errors import Unavailable


class Scale:
    """Scales when the test lets it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []
        self.go = threading.Semaphore(0)
        self.fails = False

    def __call__(self, numbers: Mapping[str, int]) -> None:
        self.calls.append(dict(numbers))
        self.go.acquire()
        if self.fails:
            raise Unavailable("no node has room")


def test_each_decision_is_carried_out_once() -> None:
    scale = Scale()
    load = FollowsLoad(scale)
    load.follow({})
    load.follow({"l/e": ("c 1", 2), "l/f": ("c 2", 3)})
    load.follow({"l/e": ("c 1", 2), "l/f": ("c 2", 3)})
    scale.go.release()
    load.wait(60)
    load.follow({"l/e": ("c 1", 2), "l/f": ("c 2", 3)})
    load.wait(60)
    assert scale.calls == [{"l/e": 2, "l/f": 3}]


def test_a_decision_waits_for_the_call_that_is_under_way() -> None:
    scale = Scale()
    load = FollowsLoad(scale)
    load.follow({"l/e": ("c 1", 2)})
    load.follow({"l/e": ("c 2", 1)})
    eventually(lambda: scale.calls == [{"l/e": 2}], 60, "the first call")
    scale.go.release()
    load.wait(60)
    load.follow({"l/e": ("c 2", 1)})
    scale.go.release()
    load.wait(60)
    assert scale.calls == [{"l/e": 2}, {"l/e": 1}]


def test_after_a_failure_the_next_decision_is_carried_out() -> None:
    scale = Scale()
    load, scale.fails = FollowsLoad(scale), True
    load.follow({"l/e": ("c 1", 2)})
    scale.go.release()
    load.wait(60)
    load.follow({"l/e": ("c 1", 2)})
    load.wait(60)
    assert scale.calls == [{"l/e": 2}]
    load.follow({"l/e": ("d 1", 2)})  # of another controller
    scale.go.release()
    load.wait(60)
    assert scale.calls == [{"l/e": 2}] * 2
