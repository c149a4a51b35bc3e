"""Requests that wait together: one run of the gate, each with its own options, and none that fails the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from helpers.waiting import run_async
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import ExpertFailed, InvalidRequest, SpecMismatch
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.fanout.answers import Answered
from expertmesh.router.fanout.batch import Batch
from expertmesh.router.fanout.fanout import Fanout
from expertmesh.router.fanout.work import assign
from expertmesh.router.gates import Gate, Routing
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.dispatch import Dispatch
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request import batching as module
from expertmesh.router.request.batching import Batching, GateRequest, Routed, route_together

E, D = 4, 3
EPOCH = Epoch(1)


def layer_of(gate: Gate, name: str = "l", **options: Any) -> Layer:
    return Layer(name, gate, {f"e{number}": Expert("torch:sin") for number in range(gate.num_experts)}, **options)


@dataclass
class Bench:
    """Batching with a fake fan-out that keeps the batches; `before` runs when a batch starts."""

    batching: Batching = field(init=False)
    batches: list[Batch] = field(default_factory=list)
    cancelled: list[Batch] = field(default_factory=list)
    started: list[tuple[float, str]] = field(default_factory=list)
    answers: bool = False
    before: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.batching = Batching(cast(Fanout, self))

    def start(
        self,
        epoch: Epoch,
        layer: Layer,
        x: Tensor,
        routing: Routing,
        handle: Dispatch,
        *,
        deadline: float,
        client: str,
        merged: bool,
    ) -> Batch:
        assignment = assign(layer, dict.fromkeys(layer.expert_ids, "v1"), x, handle)
        batch = Batch(epoch, layer, x, routing, handle, assignment)
        batch.cancel = lambda: self.cancelled.append(batch)
        self.batches.append(batch)
        self.started.append((deadline, client))
        if self.answers:
            for key, work in assignment.work.items():
                batch.answer(key, Answered((x[work.rows_R],)))
        self.before()
        return batch


def rows_of(routed: Routed) -> tuple[Tensor, Tensor]:
    part, routing = slice(routed.start, routed.stop), routed.batch.routing
    return routing.indices_TK[part], routing.weights_TK[part]


def alone(gate: Gate, request: GateRequest) -> Routing:
    return request.routing or gate.select(gate.scores(request.features), mask_TE=request.allowed, k=request.k)


GATES: list[Callable[[], Gate]] = [
    lambda: gates.TopK(D, E, k=2),
    lambda: gates.Sigmoid(D, E, k=2),
    lambda: gates.TopP(D, E),
    lambda: gates.ExpertChoice(D, E),
    lambda: gates.Fixed([0.4, 0.3, 0.2, 0.1]),
]


@st.composite
def some_requests(draw: st.DrawFn, k_allowed: bool) -> list[GateRequest]:
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(0, 3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        x = torch.randn(rows, D, generator=generator)
        kind = draw(st.sampled_from(["plain", "k", "mask", "given"]))
        allowed = torch.tensor(draw(st.lists(st.booleans(), min_size=E, max_size=E).filter(any)))
        choices = draw(st.integers(1, E))
        if kind == "given":
            indices = torch.argsort(torch.rand(rows, E, generator=generator), dim=1)[:, :choices]
            requests.append(GateRequest(x, x, routing=Routing(indices, torch.rand(rows, choices, generator=generator))))
        else:
            k = choices if kind == "k" and k_allowed else None
            requests.append(GateRequest(x, x, allowed if kind == "mask" else None, k))
    return requests


@given(data=st.data(), gate_number=st.integers(0, len(GATES) - 1), limited=st.booleans())
@settings(max_examples=120, deadline=None)
def test_each_request_is_routed_as_if_it_were_alone(data: Any, gate_number: int, limited: bool) -> None:
    torch.manual_seed(gate_number)
    gate = GATES[gate_number]()
    capacity = Capacity(factor=1.0) if limited else None
    requests = data.draw(some_requests(gate.k_per_request))

    async def main() -> None:
        bench = Bench()
        layer = layer_of(gate, capacity=capacity)
        routed = await asyncio.gather(*(bench.batching.route(EPOCH, layer, request) for request in requests))
        assert len(bench.batches) == 1
        start = 0
        for request, part in zip(requests, routed, strict=True):
            assert (part.start, part.stop) == (start, start + request.size)
            start = part.stop
            indices, weights = rows_of(part)
            expected = alone(gate, request)
            if capacity is not None:
                expected = capacity.apply(expected, E)
            width = expected.indices_TK.shape[1]
            assert torch.equal(indices[:, :width], expected.indices_TK)
            assert torch.allclose(weights[:, :width], expected.weights_TK.to(weights.dtype), atol=1e-6)
            assert bool((indices[:, width:] == -1).all())
            assert torch.equal(part.batch.x[part.start : part.stop], request.x)

    run_async(main())


def plain(rows: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = D) -> GateRequest:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return GateRequest(x, x)


def test_only_requests_of_one_layer_epoch_and_kind_of_rows_share_a_batch() -> None:
    async def main() -> None:
        bench = Bench()
        gate = gates.TopK(D, E, k=2)
        one, other = layer_of(gate), layer_of(gate, "m")
        calls = [
            (EPOCH, one, plain()),
            (EPOCH, one, plain(seed=1)),
            (Epoch(2), one, plain()),
            (EPOCH, other, plain()),
            (EPOCH, one, plain(dtype=torch.bfloat16)),
        ]
        routed = await asyncio.gather(*(bench.batching.route(*arguments) for arguments in calls))
        assert len(bench.batches) == 4
        assert routed[0].batch is routed[1].batch
        assert [part.batch.epoch.number for part in routed] == [1, 1, 2, 1, 1]
        assert routed[3].batch.layer is other

    run_async(main())


def test_a_batch_has_a_limit_but_a_large_request_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_ROWS", 5)

    async def main() -> None:
        bench = Bench(answers=True)
        layer = layer_of(gates.TopK(D, E, k=2))
        sizes = [2, 3, 1, 9, 0, 4, 1, 1]
        routed = await asyncio.gather(*(bench.batching.route(EPOCH, layer, plain(size)) for size in sizes))
        assert [batch.x.shape[0] for batch in bench.batches] == [5, 1, 9, 5, 1]
        assert [part.stop - part.start for part in routed] == sizes

    run_async(main())


def test_requests_that_arrive_during_a_run_share_the_next_batch() -> None:
    async def main() -> None:
        bench = Bench()
        layer = layer_of(gates.TopK(D, E, k=2))
        later: list[asyncio.Task[Routed]] = []

        def more() -> None:
            if not later:
                later.extend(asyncio.ensure_future(bench.batching.route(EPOCH, layer, plain(1, n))) for n in range(7))

        bench.before = more
        await bench.batching.route(EPOCH, layer, plain())
        routed = await asyncio.gather(*later)
        assert len({id(part.batch) for part in routed}) == 1
        assert len(bench.batches) == 2

    run_async(main())


def bad_requests() -> dict[str, tuple[GateRequest, type[Exception], str]]:
    nan = torch.full((1, D), torch.nan)
    return {
        "NaN": (GateRequest(nan, nan), InvalidRequest, "NaN or infinite"),
        "too many choices": (GateRequest(plain().x, plain().x, k=E + 1), InvalidRequest, "must be between 1 and 4"),
        "no expert allowed": (
            GateRequest(plain().x, plain().x, torch.zeros(E, dtype=torch.bool)), InvalidRequest, "without any expert"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_requests())
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_request_does_not_fail_the_others(case: str, place: int) -> None:
    bad, kind, message = bad_requests()[case]
    gate = gates.TopK(D, E, k=2)

    async def main() -> None:
        bench = Bench()
        layer = layer_of(gate)
        requests = [plain(seed=n) for n in range(2)]
        requests.insert(place, bad)
        results = await asyncio.gather(
            *(bench.batching.route(EPOCH, layer, request) for request in requests), return_exceptions=True
        )
        error = results.pop(place)
        assert isinstance(error, kind)
        assert message in str(error)
        for number, routed in enumerate(results):
            assert isinstance(routed, Routed)
            assert torch.equal(rows_of(routed)[0], alone(gate, plain(seed=number)).indices_TK)

    run_async(main())


def test_only_the_request_with_features_of_another_width_is_rejected() -> None:
    async def main() -> None:
        bench = Bench()
        layer = layer_of(gates.TopK(D, E, k=2))
        good = bench.batching.route(EPOCH, layer, plain())
        bad = bench.batching.route(EPOCH, layer, plain(width=D + 1))
        results = await asyncio.gather(good, bad, return_exceptions=True)
        assert isinstance(results[0], Routed)
        assert isinstance(results[1], SpecMismatch)

    run_async(main())


def test_an_exception_of_a_custom_gate_is_a_typed_error_without_its_message(caplog: Any) -> None:
    def scores(rows: Tensor) -> Tensor:
        raise ZeroDivisionError("a secret of the gate")

    async def main() -> None:
        bench = Bench()
        layer = layer_of(gates.Custom(scores, E, 2))
        with caplog.at_level(logging.CRITICAL), pytest.raises(ExpertFailed) as caught:
            await bench.batching.route(EPOCH, layer, plain())
        assert caught.value.message == "the gate of layer l raised ZeroDivisionError; see the log of the router"

    run_async(main())


def test_a_batch_is_kept_while_a_request_holds_it() -> None:
    async def main() -> None:
        bench = Bench()
        layer = layer_of(gates.TopK(D, E, k=2))
        routed = await asyncio.gather(*(bench.batching.route(EPOCH, layer, plain()) for _ in range(2)))
        routed[0].batch.release()
        assert not bench.cancelled
        routed[1].batch.release()
        assert bench.cancelled == bench.batches

    run_async(main())


@pytest.mark.parametrize("moment", ["waiting", "as the answer comes"])
def test_a_cancelled_request_holds_nothing(moment: str) -> None:
    async def main() -> None:
        bench = Bench()
        layer = layer_of(gates.TopK(D, E, k=2))
        task = asyncio.ensure_future(bench.batching.route(EPOCH, layer, plain()))
        if moment == "as the answer comes":
            bench.before = lambda: asyncio.get_running_loop().call_soon(task.cancel)  # type: ignore[assignment]
        else:
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(10):
            await asyncio.sleep(0)
        assert bench.cancelled == bench.batches
        assert len(bench.batches) == (0 if moment == "waiting" else 1)
        await bench.batching.route(EPOCH, layer, plain())  # and batching keeps working

    run_async(main())


def test_requests_without_rows_have_a_routing_too() -> None:
    for make in GATES:
        x, routing, handle = route_together(make(), [plain(0), plain(0)])
        assert x.shape == (0, D)
        assert routing.indices_TK.shape[0] == 0
        assert (handle.num_rows, handle.num_pairs) == (0, 0)


class Slow(Bench):
    """A bench whose batches end when the test finishes them."""

    def finish(self, batch: Batch) -> None:
        for key, work in batch.assignment.work.items():
            batch.answer(key, Answered((batch.x[work.rows_R],)))


async def slow_bench(monkeypatch: pytest.MonkeyPatch, longest: float) -> tuple[Slow, Layer]:
    """A bench with a batch of four rows in flight, where gathering may take `longest` seconds."""
    monkeypatch.setattr("expertmesh.router.request.batch_timing.LONGEST_WAIT", longest)
    bench, layer = Slow(), layer_of(gates.TopK(D, E, k=2))
    bench.batching._timings["l"].seconds = 60.0
    await bench.batching.route(EPOCH, layer, plain(4))
    return bench, layer


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("more", ["rows", "the end of the other"])
def test_a_small_batch_gathers_until_it_is_as_large_or_alone(monkeypatch: pytest.MonkeyPatch, more: str) -> None:
    async def main() -> None:
        bench, layer = await slow_bench(monkeypatch, 50.0)
        waiting = [asyncio.ensure_future(bench.batching.route(EPOCH, layer, plain(3)))]
        await turns()
        assert len(bench.batches) == 1
        if more == "rows":
            waiting.append(asyncio.ensure_future(bench.batching.route(EPOCH, layer, plain(1))))
        else:
            bench.finish(bench.batches[0])
        await asyncio.gather(*waiting)
        assert [batch.x.shape[0] for batch in bench.batches] == [4, 4 if more == "rows" else 3]

    run_async(main())


def test_the_queues_of_a_layer_wait_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        bench, layer = await slow_bench(monkeypatch, 50.0)
        small = asyncio.ensure_future(bench.batching.route(Epoch(2), layer, plain(1)))
        await turns()
        large = asyncio.ensure_future(bench.batching.route(Epoch(3), layer, plain(5)))
        await turns()
        assert (large.done(), small.done()) == (True, False)
        bench.finish(bench.batches[0])
        await turns()
        assert not small.done()  # the large one is still in flight
        bench.finish(bench.batches[1])
        await small

    run_async(main())


def test_no_batch_gathers_for_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        bench, layer = await slow_bench(monkeypatch, 0.02)
        for _ in range(3):
            await bench.batching.route(EPOCH, layer, plain(1))
        assert [batch.x.shape[0] for batch in bench.batches] == [4, 1, 1, 1]
        assert bench.batching._timings["l"].in_flight == 4

    run_async(main())


def test_a_batch_without_work_is_not_measured() -> None:
    async def main() -> None:
        bench, layer = Bench(), layer_of(gates.TopK(D, E, k=2))
        bench.batching._timings["l"].seconds = 60.0
        await bench.batching.route(EPOCH, layer, plain(0))
        assert (bench.batching._timings["l"].in_flight, bench.batching._timings["l"].seconds) == (0, 60.0)

    run_async(main())
