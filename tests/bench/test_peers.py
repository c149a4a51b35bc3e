"""Every peer of the benchmark computes the layer of the reference, and what measures them counts right.

Ray Serve and hivemind take long to start: their tests are marked `slow`, and run where the libraries are installed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from benchmarks.compare import turn
from benchmarks.peers import catalogue, hivemind, measure, model
from benchmarks.peers.arm import Arm
from benchmarks.peers.measure import Meter
from benchmarks.peers.private_ray import private_ray
from benchmarks.peers.ray_actors import packs
from torch import Tensor

from expertmesh.cluster.runtime.ray_environment import load_backend

TINY = model.SHAPES["T"]
LAYERS = ["in_process", "gloo", "ray_naive", "ray_good", "ray_good_2"]
BATCHES = (1, 2, 33)


@pytest.fixture(scope="module", autouse=True)
def one_ray(nothing_left: None) -> Iterator[None]:
    """One Ray for all arms on Ray; at the end neither a process nor shared memory of any arm is left."""
    load_backend(None)  # Ray is imported once in a test run, and clusters that come later want its authentication
    with private_ray():
        yield


async def apart(arm: Arm, dtype: torch.dtype) -> float:
    """The largest difference to the reference, over batches that come one by one and then all at once."""
    layer = model.reference(TINY, dtype)
    batches = [model.rows(TINY, count, dtype) for count in BATCHES]
    answers = [await arm.call(x_TD) for x_TD in batches]
    answers += await asyncio.gather(*(arm.call(x_TD) for x_TD in batches))
    assert {answer.dtype for answer in answers} == {dtype}
    return max(model.difference(y, layer(x)) for x, y in zip(batches * 2, answers, strict=True))


@pytest.mark.ray
@pytest.mark.parametrize("dtype", model.DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_an_arm_computes_the_layer(name: str, dtype: str) -> None:
    with catalogue.start(name, TINY, model.DTYPES[dtype]) as arm:
        assert asyncio.run(apart(arm, model.DTYPES[dtype])) <= model.TOLERANCE[model.DTYPES[dtype]]
        assert arm.version


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ["ray_serve", "ray_serve_batched", "ray_serve_grpc"])
def test_serve_computes_the_layer(name: str) -> None:
    pytest.importorskip("fastapi", reason="needs ray[serve]")
    with catalogue.start(name, TINY, torch.bfloat16) as arm:
        assert asyncio.run(apart(arm, torch.bfloat16)) <= model.TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.skipif(not hivemind.exists(), reason="hivemind's environment has not been made")
def test_hivemind_answers() -> None:
    with closing(hivemind.Hivemind(experts=2, width=16)) as running:
        found = [running.block(what, rows, 2, 0.2) for what, rows in (("expert", 4), ("expert", 1), ("layer", 4)) * 2]
    assert all(block["rows_per_second"] > 0 and block["p50"] > 0 for block in found)


def test_the_difference_sees_one_wrong_expert() -> None:
    x_TD = model.rows(TINY, 33, torch.float32)
    broken = model.reference(TINY, torch.float32)
    broken.functions[2].up_proj.weight.mul_(1.01)
    assert model.difference(broken(x_TD), model.reference(TINY, torch.float32)(x_TD)) > model.TOLERANCE[torch.float32]


def test_weights_follow_from_shape_and_expert_alone() -> None:
    torch.manual_seed(1)
    first = [expert.up_proj.weight for expert in model.experts(TINY, torch.float32)]
    torch.manual_seed(2)
    again = model.packed(TINY, torch.float32).up_proj
    assert torch.equal(torch.stack(first), again)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["grpc_echo", "grpc_echo_stream"])
def test_the_echo_gives_back_what_it_gets(name: str) -> None:
    async def echoed(arm: Arm) -> list[Tensor]:
        return await asyncio.gather(*(arm.call(x_TD) for x_TD in batches))

    batches = [model.rows(TINY, count, torch.bfloat16) for count in BATCHES]
    with catalogue.start(name, TINY, torch.bfloat16) as arm:
        answers = asyncio.run(echoed(arm))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(answers, batches, strict=True))


def test_one_stalled_rank_holds_up_every_step() -> None:
    with catalogue.start("gloo_stalled", TINY, torch.float32) as arm:
        seen = asyncio.run(measure.block(arm, model.rows(TINY, 4, torch.float32), 1, 0.15))
    assert min(seen.latencies) >= 0.05


def test_experts_are_packed_evenly() -> None:
    assert packs(8, 2) == [range(4), range(4, 8)]
    assert packs(3, 2) == [range(1), range(1, 3)]


class Bursts(Arm):
    """Four rows in ten milliseconds, however many ask at once."""

    version = "bursts"

    async def call(self, x_TD: Tensor) -> Tensor:
        await asyncio.sleep(0.01)
        return x_TD

    def close(self) -> None:
        pass


@pytest.mark.parametrize("in_flight", [1, 5])
def test_the_rate_counts_whole_groups(in_flight: int) -> None:
    rate = asyncio.run(measure.block(Bursts(), torch.zeros(4, 1), in_flight, 0.3)).rows_per_second
    assert 0.3 * in_flight * 400 < rate <= in_flight * 400 * 1.02  # never above what sleeping allows


def test_a_round_begins_one_further_each_time() -> None:
    assert [turn("abc", block) for block in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_our_own_load_is_told_from_that_of_others() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:  # ours: a child
        try:
            meter = Meter()
            time.sleep(0.5)
            cost = meter.cost()
        finally:
            busy.kill()
    assert cost.cpu_seconds > 0.1
    assert 0 <= cost.foreign <= 1
