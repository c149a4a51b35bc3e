"""Whole requests through the router: mixed layers as in one process, deadlines that leave nothing, epochs that hold."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess, load
from helpers.waiting import run_async
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InvalidRequest,
    NotFound,
    Overloaded,
    SpecMismatch,
    TooLarge,
    Unavailable,
    VersionGone,
)
from expertmesh.experts.protocol import CallOptions, ExpertCall, ExpertReply, PartFailure
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.epochs.epochs import Epoch
from expertmesh.router.fanout.replica_view import Replica
from expertmesh.router.fanout.transport import Cancel, Done, LocalTransport
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.mixture.local import LocalLayer
from expertmesh.router.request.answer import ForwardRequest
from expertmesh.router.request.forward import Router

SHAPE = (1, 4, 4)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


class Picture(nn.Module):
    """A whole small model over rows [1, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows.float()).to(rows.dtype)


def squared(rows: Any) -> Any:
    return rows**2 / 4 - 1


MIXED: list[Expert] = [
    Expert("numpy:sin"),
    Expert("torch:tanh"),
    Expert.from_module(Picture()),
    Expert.from_function(squared, framework="numpy"),
    Expert("torch.nn:Sigmoid"),
]


def in_process(expert: Expert, x: Tensor) -> Tensor:
    """What an expert of MIXED computes, here and in float32."""
    functions: list[Any] = [torch.sin, torch.tanh, MIXED[2].live, squared, torch.sigmoid]
    with torch.no_grad():
        return functions[MIXED.index(expert)](x.float())


@given(
    chosen=st.lists(st.integers(0, len(MIXED) - 1), min_size=1, max_size=5),
    sizes=st.lists(st.sampled_from([0, 1, 2, 17]), min_size=1, max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    replicas=st.integers(1, 2),
    before=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_unlike_experts_answer_as_in_one_process(
    chosen: list[int], sizes: list[int], dtype: torch.dtype, replicas: int, before: bool, seed: int, data: Any
) -> None:
    torch.manual_seed(seed)
    count = len(chosen)
    k = data.draw(st.integers(1, count))
    gate = gates.TopK(16, count, k=k, softmax="before" if before else "after")
    experts = {f"e{n}": replace(MIXED[number], replicas=replicas) for n, number in enumerate(chosen)}
    layer = Layer("mixed", gate, experts, input=TensorSpec(SHAPE))
    local = LocalLayer(gate, [lambda rows, number=n: in_process(MIXED[number], rows) for n in chosen])
    requests = [torch.randn(size, *SHAPE).to(dtype) for size in sizes]

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            replies = await asyncio.gather(*(mesh.ask(x, request_id=f"r{n}") for n, x in enumerate(requests)))
            for number, (x, reply) in enumerate(zip(requests, replies, strict=True)):
                with torch.no_grad():
                    routing = gate(x)
                    wanted = local.with_routing(x.float(), routing).output
                assert (reply.output.shape, reply.output.dtype) == (x.shape, dtype)
                torch.testing.assert_close(reply.output.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
                used = {f"mixed/e{e}" for e in routing.indices_TK.flatten().tolist()}
                assert reply.summary.versions == {name: mesh.versions[name] for name in used | {"mixed/gate"}}
                assert (reply.summary.request_id, reply.summary.epoch) == (f"r{number}", 1)
                assert not reply.summary.degraded
            assert mesh.router.telemetry.requests == {("mixed", "OK"): len(requests)}
            await mesh.at_rest()

    run_async(main())


def one_expert(expert: Expert, **options: Any) -> Layer:
    return Layer("l", gates.Fixed([1.0]), {"e": expert}, **options)


X = torch.ones(3, 2)


def test_a_deadline_leaves_no_pin_no_rows_and_nothing_under_way() -> None:
    release, began = threading.Event(), threading.Event()

    def slow(rows: Tensor) -> Tensor:
        began.set()
        assert release.wait(60)
        return rows

    async def main() -> None:
        async with RouterInProcess(one_expert(Expert.from_function(slow))) as mesh:
            asked = [asyncio.ensure_future(mesh.ask(X * n, timeout=0.05)) for n in range(6)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in found} == {DeadlineExceeded}
            assert "layer l did not answer within 0.050 s" in str(found[0])
            assert began.is_set()
            await mesh.at_rest()
            release.set()
            reply = await mesh.ask(X * 7)
            assert torch.equal(reply.output, X * 7)
            counted = mesh.router.telemetry.requests
            assert counted == {("l", "DEADLINE_EXCEEDED"): 6, ("l", "OK"): 1}
            assert mesh.router.fanout.waiting() == {"l/e#0": 0}
            await mesh.at_rest()

    run_async(main())
    release.set()


class Never(LocalTransport):
    """A transport that never answers; it counts what it was sent, and what of it was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[ExpertCall] = []
        self.given_up = 0

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        self.sent.append(call)
        return self._cancel

    def _cancel(self) -> None:
        self.given_up += 1


@given(timeouts=st.lists(st.sampled_from([0.0, 0.001, 0.02]), min_size=1, max_size=8), top_k=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_no_deadline_ever_leaves_anything(timeouts: list[float], top_k: int) -> None:
    layer = Layer("l", gates.Fixed([0.5, 0.5]), {"a": Expert("torch:sin"), "b": Expert("torch:cos")})

    async def main() -> None:
        wire = Never()
        async with RouterInProcess(layer, wire) as mesh:
            asked = [mesh.ask(X, timeout=timeout, top_k=top_k) for timeout in timeouts]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in found} == {DeadlineExceeded}
            await mesh.at_rest()
            assert set(mesh.router.fanout.waiting().values()) <= {0} or not wire.sent
            before = len(wire.sent)
            mesh.report(*(mesh.replica(name, incarnation="2") for name in mesh.hosts))
            await mesh.at_rest()
            assert len(wire.sent) == before  # nobody waits any more, so nothing is sent again

    run_async(main())


def test_a_caller_that_goes_away_is_counted_as_such_and_leaves_nothing() -> None:
    async def main() -> None:
        async with RouterInProcess(one_expert(Expert("torch:sin")), Never()) as mesh:
            asked = asyncio.ensure_future(mesh.ask(X))
            while not mesh.router.view.rows_in_flight()["l/e#0"]:
                await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert mesh.router.telemetry.requests == {("l", "CANCELLED"): 1}
            await mesh.at_rest()

    run_async(main())


def test_what_is_refused_is_counted_by_its_code_and_never_by_a_strangers_name() -> None:
    async def main() -> None:
        async with RouterInProcess(
            one_expert(Expert("torch:sin"), input=TensorSpec((2,))), max_rows_in_flight=8
        ) as mesh:
            refused: list[tuple[type[ExpertMeshError], dict[str, Any]]] = [
                (NotFound, {"x": X, "layer": "made up by a caller"}),
                (SpecMismatch, {"x": torch.ones(1, 3)}),
                (SpecMismatch, {"x": torch.tensor(1.0)}),
                (TooLarge, {"x": torch.ones(7, 2)}),
                (InvalidRequest, {"x": X, "on_missing": "zero"}),
                (InvalidRequest, {"x": X, "top_k": 2}),
            ]
            for kind, arguments in refused:
                with pytest.raises(kind):
                    await mesh.ask(**arguments)
                await mesh.at_rest()
            assert mesh.router.telemetry.requests == {
                ("", "NOT_FOUND"): 1,
                ("l", "INVALID_ARGUMENT"): 4,
                ("l", "RESOURCE_EXHAUSTED"): 1,
            }

    run_async(main())


def test_before_the_first_epoch_a_request_is_unavailable_and_its_layer_is_not_counted() -> None:
    async def main() -> None:
        router = Router(Never())
        with pytest.raises(Unavailable, match="has not received its layers"):
            await router.forward(ForwardRequest(X, CallOptions(layer="made up"), 1.0))
        assert router.telemetry.requests == {("", "UNAVAILABLE"): 1}

    run_async(main())


def test_rows_above_the_bound_are_refused_early() -> None:
    async def main() -> None:
        async with RouterInProcess(one_expert(Expert("torch:sin")), Never(), max_rows_in_flight=8) as mesh:
            held = [asyncio.ensure_future(mesh.ask(X)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await mesh.ask(X)
            for asked in held:
                asked.cancel()
            await asyncio.wait(held)
            await mesh.at_rest()

    run_async(main())


class Replacing(LocalTransport):
    """A transport under which the only replica gets another version while the first message is on its way."""

    def __init__(self, everywhere: bool = True) -> None:
        super().__init__()
        self.mesh: RouterInProcess | None = None
        self.calls: list[ExpertCall] = []
        self.everywhere = everywhere

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        mesh, before = self.mesh, not self.calls
        assert mesh is not None
        self.calls.append(call)
        if before:
            host = mesh.hosts[replica.id]
            old = mesh.versions["l/e"]
            new = load(host, "l/e", Expert("helpers.samples:Affine", args=(2, 5.0)), 2).version
            host.unload("l/e", old)
            mesh.report()
            if self.everywhere:
                versions = {**mesh.versions, "l/e": new, "l/gate": "v2-000000000000"}
                mesh.router.adopt(Epoch(2, versions, {"l": mesh.layer}))
            reply = ExpertReply(host.incarnation, (PartFailure("VersionGone", f"{old} is not loaded here"),))
            return asyncio.get_running_loop().call_soon(done, reply).cancel
        return mesh.local.send(replica, call, done)


def test_a_version_that_is_gone_begins_again_from_the_gate_on_the_current_epoch() -> None:
    async def main() -> None:
        wire = Replacing()
        async with RouterInProcess(one_expert(Expert("helpers.samples:Affine", args=(2, 3.0))), wire) as mesh:
            wire.mesh = mesh
            reply = await mesh.ask(X)
            assert torch.equal(reply.output, X * 5)
            assert reply.summary.epoch == 2
            assert reply.summary.versions["l/e"].startswith("v2-")
            assert reply.summary.versions["l/gate"] == "v2-000000000000"
            await mesh.at_rest()

    run_async(main())


def test_a_version_that_is_gone_with_no_newer_epoch_is_told() -> None:
    async def main() -> None:
        wire = Replacing(everywhere=False)
        async with RouterInProcess(one_expert(Expert("helpers.samples:Affine", args=(2, 3.0))), wire) as mesh:
            wire.mesh = mesh
            with pytest.raises(VersionGone, match="no replica holds l/e v1-"):
                await mesh.ask(X)
            await mesh.at_rest()

    run_async(main())


def test_a_request_keeps_its_epoch_though_another_is_adopted_meanwhile() -> None:
    began, release = threading.Event(), threading.Event()

    def slow(rows: Tensor) -> Tensor:
        began.set()
        assert release.wait(60)
        return rows * 3

    async def main() -> None:
        async with RouterInProcess(one_expert(Expert.from_function(slow))) as mesh:
            first = asyncio.ensure_future(mesh.ask(X))
            await asyncio.get_running_loop().run_in_executor(None, began.wait, 60)
            host = mesh.hosts["l/e#0"]
            new = load(host, "l/e", Expert("helpers.samples:Affine", args=(2, 5.0)), 2).version
            mesh.report()
            assert mesh.router.adopt(Epoch(2, {**mesh.versions, "l/e": new}, {"l": mesh.layer}))
            assert mesh.router.epochs.pins() == {1: 1}
            assert mesh.router.epochs.oldest_pinned() == 1
            second = asyncio.ensure_future(mesh.ask(X))
            await asyncio.sleep(0)
            release.set()
            replies = await asyncio.gather(first, second)
            assert [reply.summary.epoch for reply in replies] == [1, 2]
            assert [reply.summary.versions["l/e"] for reply in replies] == [mesh.versions["l/e"], new]
            assert [float(reply.output[0, 0]) for reply in replies] == [3.0, 5.0]
            assert mesh.router.epochs.oldest_pinned() == 2
            await mesh.at_rest()

    run_async(main())


@pytest.mark.parametrize(
    ("lost", "strict", "lenient"),
    [("", True, True), ("l/a#0", False, True), ("l/a#0 l/b#0", False, False), ("l/s#0", False, False)],
)
def test_a_layer_serves_while_its_experts_do_or_its_policy_covers_for_them(
    lost: str, strict: bool, lenient: bool
) -> None:
    experts, shared = {name: Expert("torch:sin") for name in ("a", "b")}, {"s": Expert("torch:cos")}

    async def main() -> None:
        for on_missing, wanted in (("error", strict), ("renormalize", lenient)):
            layer = Layer("l", gates.Fixed([0.5, 0.5]), experts, shared=shared, on_missing=on_missing)
            async with RouterInProcess(layer) as mesh:
                mesh.report(*(mesh.replica(name, state="hung") for name in lost.split()))
                assert mesh.router.serves("l") is wanted
                mesh.report()
                assert mesh.router.serves("l")
                for name in lost.split():
                    mesh.router.view.failed(name)
                assert mesh.router.serves("l") is wanted

    run_async(main())


def test_a_layer_that_is_no_more_is_not_found() -> None:
    async def main() -> None:
        async with RouterInProcess(one_expert(Expert("torch:sin"))) as mesh:
            mesh.router.adopt(Epoch(2, {}, {}))
            with pytest.raises(NotFound, match="there is no layer 'l'; this cluster serves none"):
                await mesh.ask(X)

    run_async(main())


def test_many_requests_at_once_are_not_mixed_up() -> None:
    layer = Layer("l", gates.TopK(2, 3, k=2), {name: Expert(f"torch:{name}") for name in ("sin", "cos", "tanh")})

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            rows = [torch.full((1 + n % 3, 2), n / 50) for n in range(200)]
            replies = await asyncio.gather(*(mesh.ask(x) for x in rows))
            local = LocalLayer(layer.gate, [torch.sin, torch.cos, torch.tanh])
            for x, reply in zip(rows, replies, strict=True):
                torch.testing.assert_close(reply.output, local(x).detach())
            assert sum(mesh.router.telemetry.messages.values()) <= 3 * 3  # not 200 · 2: what waits goes together
            await mesh.at_rest()

    run_async(main())
