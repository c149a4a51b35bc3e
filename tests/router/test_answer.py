"""Answers to whole requests: equal to the sum written out row by row, also where experts fail, and named exactly."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.row_functions import nan_below_zero, raising, times
from helpers.waiting import run_async
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import ExpertFailed, ExpertMeshError, InvalidRequest, SpecMismatch, Unavailable
from expertmesh.experts.protocol import ExpertCall, ExpertReply
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.fanout.fanout import MAX_DEATHS
from expertmesh.router.fanout.replica_view import Replica
from expertmesh.router.fanout.transport import Cancel, Died, Done, LocalTransport
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.combine import METHODS
from expertmesh.router.mixture.layer import Layer

E, D = 4, 3
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def functions_of(kinds: list[str]) -> list[Callable[[Tensor], Tensor]]:
    makers: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
        "good": times,
        "raises": lambda by: raising,
        "NaN": lambda by: lambda rows: torch.full_like(rows, torch.nan),
        "sometimes": nan_below_zero,
        "infinite": lambda by: lambda rows: rows / 0,
    }
    return [makers[kind](1.0 + number / 2) for number, kind in enumerate(kinds)]


def layer_of(kinds: list[str], **options: Any) -> Layer:
    torch.manual_seed(0)
    experts = {f"e{n}": Expert.from_function(function) for n, function in enumerate(functions_of(kinds))}
    gate = options.pop("gate", None) or gates.TopK(D, len(kinds), k=2)
    return Layer("l", gate, experts, **{"input": TensorSpec((D,)), **options})


def some_rows(rows: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, (rows, D), generator=torch.Generator().manual_seed(seed)).to(dtype) / 4 + 1 / 8


class Refused(Exception):
    """What the reference says of a request that must be refused: with the class of the error."""

    def __init__(self, kind: type[ExpertMeshError]) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


def reference(
    x: Tensor, kinds: list[str], routing: Routing, policy: str, limit: float
) -> tuple[Tensor, list[float], set[int], set[int]]:
    """Rows, lost mass of each, who took part and who is missing, one pair at a time in float64."""
    functions, kind = functions_of(kinds), policy.partition(":")[0]
    fallback = int(policy.partition(":e")[2] or 0)
    output, masses = torch.zeros(x.shape, dtype=torch.float64), []
    took_part: set[int] = set()
    missing: set[int] = set()
    raised = False
    wanted_fallback: list[int] = []
    empty = False
    for row in range(x.shape[0]):
        pairs = [
            (expert, weight)
            for expert, weight in zip(routing.indices_TK[row].tolist(), routing.weights_TK[row].tolist(), strict=True)
            if expert >= 0
        ]
        lost_weight, kept = [], []
        for expert, weight in pairs:
            raised |= kinds[expert] == "raises"
            value = None if kinds[expert] == "raises" else functions[expert](x[row : row + 1])[0].double()
            if value is None or not bool(value.isfinite().all()):
                lost_weight.append(weight)
                missing.add(expert)
            else:
                kept.append((weight, value))
                took_part.add(expert)
        chosen = sum(abs(weight) for _, weight in pairs)
        lost = sum(map(abs, lost_weight))
        masses.append(lost / chosen)
        total = sum((weight * value for weight, value in kept), torch.zeros(D, dtype=torch.float64))
        if lost_weight and kind == "renormalize":
            empty |= not kept
            total = total * (chosen / max(chosen - lost, 1e-30))
        elif lost_weight and kind == "residual":
            total = total + sum(lost_weight) * x[row].double()
        elif lost_weight and kind == "fallback":
            wanted_fallback.append(row)
            if kinds[fallback] != "raises":
                total = total + sum(lost_weight) * functions[fallback](x[row : row + 1])[0].double()
        output[row] = total
    if kind == "error" and raised:
        raise Refused(ExpertFailed)
    if kind == "error" and missing:
        raise Refused(Unavailable)
    if wanted_fallback and kinds[fallback] == "raises":
        raise Refused(ExpertFailed)
    if max(masses, default=0.0) > limit + 1e-6 or empty:
        raise Refused(Unavailable)
    if not bool(output.isfinite().all()):
        raise Refused(Unavailable)
    if wanted_fallback:
        took_part.add(fallback)
    return output, masses, took_part, missing


kinds_of_experts = st.lists(
    st.sampled_from(["good", "good", "good", "raises", "NaN", "sometimes", "infinite"]), min_size=1, max_size=E
)


@given(
    kinds=kinds_of_experts,
    rows=st.sampled_from([0, 1, 1, 2, 5]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from(["error", "renormalize", "residual", "fallback:e0"]),
    limit=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_an_answer_is_the_sum_written_out(
    kinds: list[str], rows: int, seed: int, dtype: torch.dtype, policy: str, limit: float, data: Any
) -> None:
    k = data.draw(st.integers(1, len(kinds)))
    x = some_rows(rows, seed, dtype)
    layer = layer_of(kinds, gate=gates.TopK(D, len(kinds), k=k))
    with torch.no_grad():
        routing = layer.gate(x)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            asked = mesh.ask(x, on_missing=policy, max_lost_mass=limit, return_routing=True)
            try:
                output, masses, took_part, missing = reference(x, kinds, routing, policy, limit)
            except Refused as refused:
                with pytest.raises(refused.kind):
                    await asked
                await mesh.at_rest()
                return
            reply = await asked
            assert reply.output.dtype == dtype
            assert reply.output.shape == x.shape
            torch.testing.assert_close(reply.output.double(), output, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            torch.testing.assert_close(reply.lost_mass.tolist(), masses, rtol=0, atol=1e-5)
            assert reply.summary.max_lost_mass == pytest.approx(max(masses, default=0.0), abs=1e-5)
            assert reply.summary.degraded == bool(missing)
            assert reply.summary.missing == sorted(f"l/e{expert}" for expert in missing)
            named = {f"l/e{expert}" for expert in took_part} | {"l/gate"}
            assert reply.summary.versions == {name: mesh.versions[name] for name in named}
            assert reply.indices is not None
            assert torch.equal(reply.indices, routing.indices_TK)
            await mesh.at_rest()

    run_async(main())


@given(
    sizes=st.lists(st.integers(0, 3), min_size=2, max_size=6),
    policies=st.lists(st.sampled_from(["renormalize", "residual", "fallback:e0", "error"]), min_size=6, max_size=6),
    choices=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    denied=st.lists(st.sampled_from(["e0", "e1", "e2", None]), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_requests_in_one_batch_keep_their_own_options_and_troubles(
    sizes: list[int], policies: list[str], choices: list[int], denied: list[str | None], seed: int
) -> None:
    kinds = ["good", "raises", "sometimes", "good"]
    layer = layer_of(kinds)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            requests = []
            for number, size in enumerate(sizes):
                x = some_rows(size, seed + number, torch.float32)
                mask = torch.ones(E, dtype=torch.bool)
                if denied[number] is not None:
                    mask[int(str(denied[number])[1])] = False
                options: dict[str, Any] = {
                    "on_missing": policies[number],
                    "max_lost_mass": 1.0,
                    "top_k": choices[number],
                }
                if denied[number] is not None:
                    options["deny"] = [denied[number]]
                with torch.no_grad():
                    routing = layer.gate(x, mask_TE=mask, k=choices[number])
                requests.append((x, options, routing))
            replies = await asyncio.gather(
                *(mesh.ask(x, **options) for x, options, _ in requests), return_exceptions=True
            )
            assert mesh.router.telemetry.batches["l"] == 1
            refusals: list[tuple[type, type]] = []
            for (x, options, routing), reply in zip(requests, replies, strict=True):
                try:
                    output, _, took_part, _ = reference(x, kinds, routing, options["on_missing"], 1.0)
                except Refused as refused:
                    refusals.append((type(reply), refused.kind))
                    continue
                assert not isinstance(reply, BaseException)
                torch.testing.assert_close(reply.output.double(), output, rtol=1e-5, atol=1e-5)
                assert set(reply.summary.versions) == {f"l/e{expert}" for expert in took_part} | {"l/gate"}
            assert all(got is wanted for got, wanted in refusals)
            await mesh.at_rest()

    run_async(main())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_every_way_of_combining(method: str, rows: int) -> None:
    layer = layer_of(["good"] * E, combine=method)
    x = some_rows(rows, 5, torch.float32)
    with torch.no_grad():
        routing = layer.gate(x)
    answers = torch.stack([x * (1.0 + n / 2) for n in range(E)], dim=1)[torch.arange(rows)[:, None], routing.indices_TK]
    weighted = (routing.weights_TK[..., None] * answers).sum(dim=1)
    wanted = {
        "weighted_sum": weighted,
        "residual": x + weighted,
        "mean": answers.mean(dim=1),
        "vote": answers.argmax(dim=2).mode(dim=1).values if rows else torch.zeros(0, dtype=torch.int64),
    }[method]

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            reply = await mesh.ask(x)
            assert reply.output.shape == wanted.shape
            torch.testing.assert_close(reply.output, wanted, check_dtype=method == "vote")

    run_async(main())


OTHER_SHAPES = {
    "labels": (
        Expert("helpers.samples:labels", input=TensorSpec((D,)), output=TensorSpec((), "int64")),
        "vote",
        (),
        torch.int64,
    ),
    "classes": (Expert("torch.nn:Linear", args=(D, 5)), "weighted_sum", (5,), torch.float32),
    "a live module": (Expert.from_module(torch.nn.Linear(D, 2)), "mean", (2,), torch.float32),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_have_the_shape_and_dtype_of_some(case: str, rows: int) -> None:
    expert, method, shape, dtype = OTHER_SHAPES[case]
    output = expert.output if expert.output.shape is not None else TensorSpec(shape, "float32")
    experts = {name: replace(expert, output=output) for name in ("a", "b")}
    layer = Layer("l", gates.TopK(D, 2, k=1), experts, combine=method)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            reply = await mesh.ask(some_rows(rows, 1, torch.float32))
            assert reply.output.shape == (rows, *shape)
            assert reply.output.dtype == dtype
            assert reply.lost_mass.shape == (rows,)

    run_async(main())


def test_a_fallback_answers_alone_though_nothing_says_of_what_shape() -> None:
    def classes(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows], dim=1)

    experts = {"bad": Expert.from_function(raising), "good": Expert.from_function(classes)}
    layer = Layer("l", gates.Fixed([1.0, 0.5], k=1), experts, on_missing="fallback:good", max_lost_mass=1.0)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            x = some_rows(3, 1, torch.float32)
            reply = await mesh.ask(x)
            torch.testing.assert_close(reply.output, classes(x))
            assert set(reply.summary.versions) == {"l/good", "l/gate"}
            assert (reply.summary.missing, reply.summary.max_lost_mass) == (["l/bad"], 1.0)

    run_async(main())


def test_integer_rows_have_floating_answers() -> None:
    experts = {"e": Expert("torch.nn:Embedding", args=(8, 3), input=TensorSpec((), "int64"))}
    layer = Layer("l", gates.Fixed([2.0]), experts, input=TensorSpec((), "int64"))

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            reply = await mesh.ask(torch.tensor([1, 7]))
            assert reply.output.shape == (2, 3)
            assert reply.output.dtype == torch.float32

    run_async(main())


def test_experts_of_different_shapes_are_refused() -> None:
    experts = {"a": Expert("helpers.samples:relu"), "b": Expert.from_function(lambda rows: rows[:, :1])}
    layer = Layer("l", gates.Fixed([1.0, 1.0]), experts)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            with pytest.raises(SpecMismatch, match="their answers cannot be combined"):
                await mesh.ask(some_rows(2, 1, torch.float32))
            await mesh.at_rest()

    run_async(main())


def test_a_routing_of_the_callers_names_no_gate() -> None:
    layer = layer_of(["good"] * E)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            x = some_rows(2, 3, torch.float32)
            indices, weights = torch.tensor([[3, 0], [1, -1]]), torch.tensor([[0.25, 0.5], [2.0, 7.0]])
            reply = await mesh.ask(x, indices=indices, weights=weights, return_routing=True)
            wanted = torch.stack([x[0] * (0.25 * 2.5 + 0.5), x[1] * 2.0 * 1.5])
            torch.testing.assert_close(reply.output, wanted)
            assert set(reply.summary.versions) == {"l/e0", "l/e1", "l/e3"}
            assert reply.weights is not None
            assert reply.weights.tolist() == [[0.25, 0.5], [2.0, 0.0]]

    run_async(main())


def test_nan_of_the_caller_is_the_callers_mistake() -> None:
    layer = layer_of(["good"] * 2, gate=gates.Fixed([0.5, 0.5]))

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            with pytest.raises(InvalidRequest, match="x holds NaN or infinity"):
                await mesh.ask(torch.full((1, D), torch.nan))

    run_async(main())


@pytest.mark.parametrize("policy", ["renormalize", "residual"])
def test_large_rows_are_not_to_blame_where_an_expert_gave_no_answer(policy: str) -> None:
    layer = layer_of(["good", "raises"], gate=gates.Fixed([0.5, 0.5]), on_missing=policy)

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            with pytest.raises(Unavailable, match="lost"):
                await mesh.ask(torch.full((1, D), 300.0, dtype=torch.float16), max_lost_mass=0.1)

    run_async(main())


def test_shared_experts_take_part_in_every_answer_and_no_policy_covers_them() -> None:
    def layer(shared: str) -> Layer:
        (function,) = functions_of([shared])
        return layer_of(["good"] * 2, on_missing="residual", shared={"s": Expert.from_function(function)})

    async def main() -> None:
        x = some_rows(3, 3, torch.float32)
        async with RouterInProcess(layer("good")) as mesh:
            plain = await RouterInProcess(layer_of(["good"] * 2)).__aenter__()
            reply, without = await mesh.ask(x), await plain.ask(x)
            torch.testing.assert_close(reply.output, without.output + x)
            assert set(reply.summary.versions) - set(without.summary.versions) == {"l/s"}
            assert set((await mesh.ask(x[:0])).summary.versions) == {"l/gate"}
            await plain.__aexit__()
        async with RouterInProcess(layer("raises")) as mesh:
            with pytest.raises(ExpertFailed, match="l/s raised"):
                await mesh.ask(x, max_lost_mass=1.0)
        async with RouterInProcess(layer("NaN")) as mesh:
            with pytest.raises(Unavailable, match="not finite"):
                await mesh.ask(x, max_lost_mass=1.0)

    run_async(main())


def test_what_capacity_drops_is_degraded_but_nobody_is_missing() -> None:
    layer = layer_of(["good"] * 2, gate=gates.TopK(D, 2, k=1), capacity=Capacity(factor=0.5), on_dropped="residual")

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            x = some_rows(1, 1, torch.float32).expand(6, D).contiguous()
            reply = await mesh.ask(x)
            assert (reply.summary.degraded, reply.summary.missing) == (True, [])
            assert reply.summary.dropped == 4
            assert reply.summary.max_lost_mass == 0.0
            torch.testing.assert_close(reply.output[2:], x[2:])

    run_async(main())


class Deadly(LocalTransport):
    """Replicas whose process ends when it computes the row `poison`, with everything that is in flight to it."""

    def __init__(self, poison: Tensor) -> None:
        super().__init__()
        self.poison = poison
        self.dead: list[str] = []

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        def computed(reply: ExpertReply | ExpertMeshError | Died) -> None:
            if replica.id not in self.dead and (call.rows == self.poison).all(dim=1).any():
                self.dead.append(replica.id)
            done(Died() if replica.id in self.dead else reply)

        if replica.id in self.dead:
            return asyncio.get_running_loop().call_soon(done, Unavailable("there is no connection")).cancel
        return super().send(replica, call, computed)


@pytest.mark.parametrize("pack", [None, "p"])
@pytest.mark.parametrize("policy", ["error", "renormalize"])
def test_of_requests_that_were_merged_only_the_one_that_ends_processes_fails(pack: str | None, policy: str) -> None:
    functions = functions_of(["good"] * E)
    experts = {f"e{n}": Expert.from_function(function, pack=pack, replicas=4) for n, function in enumerate(functions)}
    shared = {"s": Expert.from_function(times(7.0), replicas=4)}
    layer = Layer("l", gates.TopK(D, E, k=2), experts, shared=shared, on_missing=policy)
    requests = [some_rows(rows, seed, torch.float32) for seed, rows in enumerate([2, 1, 3, 0, 1])]
    deadly = 2
    transport = Deadly(requests[deadly][1])

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            wanted = [await mesh.ask(x) for x in requests]
        async with RouterInProcess(layer, transport) as mesh:
            for name, host in mesh.hosts.items():
                transport.add(name, host)
            replies = await asyncio.gather(*(mesh.ask(x) for x in requests), return_exceptions=True)
            assert mesh.router.telemetry.batches["l"] == 1 + len(requests)  # merged, then each of them alone
            await mesh.at_rest()
        failed = replies.pop(deadly)
        assert isinstance(failed, ExpertFailed)
        assert "2 replicas died while they computed these rows" in failed.message
        for reply, undisturbed in zip(replies, wanted[:deadly] + wanted[deadly + 1 :], strict=True):
            assert not isinstance(reply, BaseException), reply
            torch.testing.assert_close(reply.output, undisturbed.output)
            assert reply.summary.versions == undisturbed.summary.versions
            assert not reply.summary.degraded
        deaths = Counter(name.partition("#")[0] for name in transport.dead)
        assert set(deaths.values()) == {MAX_DEATHS}

    try:
        run_async(main())
    finally:
        transport.close()
