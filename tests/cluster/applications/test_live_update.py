"""Requests go on during an update, and each is accounted for."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.client.reply import Reply
from expertmesh.cluster.rpc.swaps import SwapOutcome
from expertmesh.experts.errors import Unavailable


class Served:
    """What serves: its epoch and versions, which an update changes."""

    def __init__(self, faults: tuple[str, ...] = ()) -> None:
        self.epoch, self.versions = 1, {"l/e0": "v1-a", "l/e1": "v1-b"}
        self.during = threading.Event()
        self._faults = faults
        self._count = itertools.count()

    def request(self) -> Reply:
        number = next(self._count)
        epoch, versions = self.epoch, dict(self.versions)
        if number == 5 and "fails" in self._faults:
            raise Unavailable("lost")
        if number == 6 and "mixes" in self._faults:
            versions["l/e0"] = "v9-z"
        told: Any = {"output": None, "lost_mass": None, "max_lost_mass": 0.0, "request_id": "", "dropped": 0}
        return Reply(epoch=epoch, versions=versions, degraded=False, missing=[], **told)

    def update(self) -> list[SwapOutcome]:
        before = dict(self.versions)
        after = {**before, "l/e0": "v2-c"}
        self.versions, self.epoch = after, 2
        return [SwapOutcome(swap_id="s", epoch=2, before=before, after=after)]


def test_only_changed_versions_are_named_and_quality_is_measured_before_and_after() -> None:
    served = Served()
    found = update_live(served.request, served.update, lambda: float(served.epoch))
    assert (found.before, found.after) == (1.0, 2.0)
    assert found.versions == {"l/e0": "v2-c"}
    assert found.requests >= 40
    assert found.failed == 0


@pytest.mark.parametrize(("fault", "counted"), [("fails", "failed"), ("mixes", "mixed")])
def test_a_request_that_fails_or_mixes_is_counted(fault: str, counted: str) -> None:
    served = Served((fault,))
    found = update_live(served.request, served.update, lambda: 0.0)
    assert getattr(found, counted) == 1
    assert not found.ok


def test_an_update_that_raises_stops_the_requests() -> None:
    served = Served()
    before = threading.active_count()

    def failing() -> list[SwapOutcome]:
        raise Unavailable("it cannot be published")

    with pytest.raises(Unavailable):
        update_live(served.request, failing, lambda: 0.0)
    assert threading.active_count() == before
