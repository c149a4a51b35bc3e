"""Fifty swaps while calls come in: none fails, and every answer is recomputed from the versions that it names."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.swap_cluster import EXPERTS, GATE, SwapCluster, Weights, X, swap_cluster

from expertmesh import Client, Reply
from expertmesh.experts.errors import Aborted, ExpertMeshError

SWAPS = 50
CALLERS = 3
pytestmark = pytest.mark.usefixtures("own_home")


class Callers:
    """Threads that call without a pause; what they were told is kept."""

    def __init__(self, endpoint: str) -> None:
        self.replies: list[Reply] = []
        self.failed: list[str] = []
        self._endpoint = endpoint
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def _call(self) -> None:
        with Client(self._endpoint, timeout=30.0) as client:
            highest = 0
            while not self._stop.is_set():
                try:
                    reply = client.call("l", X)
                except ExpertMeshError as error:
                    self.failed.append(repr(error))
                else:
                    if reply.epoch < highest:
                        self.failed.append(f"went back from epoch {highest} to {reply.epoch}")
                    highest = reply.epoch
                    self.replies.append(reply)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def seeds_of(number: int) -> dict[str, int]:
    """What the swap of this number replaces: one expert, or a set of them, every third time with the gate."""
    first = f"l/{EXPERTS[number % 3]}"
    seeds = {first: 100 + number}
    if number % 2:
        seeds[f"l/{EXPERTS[(number + 1) % 3]}"] = 200 + number
    if number % 3 == 0:
        seeds[GATE] = 300 + number
    return seeds


def swap_until_drained(made: SwapCluster, seeds: dict[str, int]) -> Any:
    """A swap; while the one before it still drains, it is asked for again."""
    while True:
        try:
            return made.swap(seeds)
        except Aborted as error:
            if "draining" not in str(error):
                raise
            threading.Event().wait(0.005)


@pytest.mark.parametrize("replicas", [1, 2])
def test_no_call_fails_and_every_answer_is_that_of_the_versions_it_names(tmp_path: Path, replicas: int) -> None:
    with swap_cluster(tmp_path, replicas=replicas, retain_epochs=2) as made:
        with Callers(made.cluster.endpoint) as callers:
            for number in range(SWAPS):
                seeds = seeds_of(number)
                outcome = swap_until_drained(made, seeds)
                assert outcome.after.keys() == seeds.keys()
                assert outcome.epoch == number + 2
                after = made.call()
                assert after.epoch >= outcome.epoch
        assert not callers.failed, callers.failed[:3]
        check_replies(made.weights, callers.replies)
        assert made.client.status()["router"]["failed_requests"] == 0
        assert made.uploads() == []


def check_replies(weights: Weights, replies: list[Reply]) -> None:
    """Recompute every answer; many epochs were seen."""
    for reply in replies:
        weights.check(reply)
    assert len(replies) >= SWAPS
    assert len({reply.epoch for reply in replies}) > SWAPS / 4


def test_a_checker_that_is_told_of_other_versions_finds_it(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as made:
        reply = made.call()
        made.weights.known["l/a", reply.versions["l/a"]] += 1
        with pytest.raises(AssertionError):
            made.weights.check(reply)
