"""Experts of a pack through the whole router: the sums that a replica makes change nothing but what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.row_functions import nan_below_zero, raising, times
from helpers.waiting import run_async
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import ExpertFailed, SpecMismatch, Unavailable
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

E, D = 6, 4


KINDS: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
    "good": times,
    "sometimes": nan_below_zero,
    "raises": lambda by: raising,
}


def layer_of(packs: list[str | None], kinds: list[str], **options: Any) -> Layer:
    """The same experts whatever the packs: expert n multiplies by n + 1."""
    torch.manual_seed(0)
    experts = {
        f"e{n}": Expert.from_function(KINDS[kind](n + 1.0), pack=pack)
        for n, (kind, pack) in enumerate(zip(kinds, packs, strict=True))
    }
    return Layer("l", gates.TopK(D, E, k=3), experts, input=TensorSpec((D,)), **options)


async def answers(layer: Layer, x: Tensor, **options: Any) -> Any:
    async with RouterInProcess(layer) as mesh:
        try:
            reply = await mesh.ask(x, return_routing=True, **options)
        except (ExpertFailed, Unavailable) as error:
            await mesh.at_rest()
            return type(error), mesh
        await mesh.at_rest()
        return reply, mesh


@given(
    packs=st.lists(st.sampled_from(["p", "p", "q", None]), min_size=E, max_size=E),
    kinds=st.lists(st.sampled_from(["good", "good", "good", "sometimes", "raises"]), min_size=E, max_size=E),
    rows=st.sampled_from([0, 1, 3, 17]),
    seed=st.integers(0, 99),
    method=st.sampled_from(["weighted_sum", "residual", "mean"]),
    policy=st.sampled_from(["error", "renormalize", "residual"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=120, deadline=None)
def test_packs_change_no_answer(
    packs: list[str | None],
    kinds: list[str],
    rows: int,
    seed: int,
    method: str,
    policy: str,
    dtype: torch.dtype,
) -> None:
    x = (torch.randint(-8, 9, (rows, D), generator=torch.Generator().manual_seed(seed)) / 4 + 1 / 8).to(dtype)

    async def main() -> None:
        options = {"on_missing": policy, "max_lost_mass": 1.0}
        alone, _ = await answers(layer_of([None] * E, kinds, combine=method), x, **options)
        packed, mesh = await answers(layer_of(packs, kinds, combine=method), x, **options)
        if isinstance(alone, type):
            assert packed is alone
            return
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(packed.output, alone.output, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(packed.lost_mass, alone.lost_mass)
        assert packed.summary.missing == alone.summary.missing
        assert packed.summary.versions.keys() == alone.summary.versions.keys()
        assert torch.equal(packed.indices, alone.indices)
        replicas = {name for name, count in mesh.router.telemetry.messages.items() if count}
        assert set(mesh.router.telemetry.messages.values()) <= {1}, "one message for each replica"
        assert len(replicas) <= len(mesh.hosts)

    run_async(main())


def test_a_replica_sends_fewer_rows_than_its_experts_answer() -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))

    async def main() -> None:
        layer = layer_of(["p"] * E, ["good"] * E)
        async with RouterInProcess(layer) as mesh:
            sent: list[Any] = []
            (host,) = mesh.hosts.values()
            compute = host.compute
            host.compute = lambda call: sent.append((call, compute(call))) or sent[-1][1]  # type: ignore[method-assign, func-returns-value]
            reply = await mesh.ask(x)
            ((call, answer),) = sent
            assert call.rows.shape[0] == 64, "each row once"
            assert [part.stop - part.start for part in call.parts] != []
            assert sum(part.stop - part.start for part in call.parts) == 3 * 64
            assert answer.outputs == (None,) * len(call.parts)
            assert answer.sums[0].shape == (64, D)
            torch.testing.assert_close(reply.output, answer.sums[0])

    run_async(main())


@given(
    packs=st.lists(st.sampled_from(["p", "p", "q", None]), min_size=E, max_size=E),
    sizes=st.lists(st.integers(0, 5), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    method=st.sampled_from(["weighted_sum", "residual", "mean"]),
)
@settings(max_examples=40, deadline=None)
def test_requests_of_one_batch_each_get_their_own_sums(
    packs: list[str | None], sizes: list[int], seed: int, method: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    requests = [torch.randn(size, D, generator=generator) for size in sizes]

    async def main() -> None:
        async with RouterInProcess(layer_of([None] * E, ["good"] * E, combine=method)) as plain:
            expected = [(await plain.ask(x)).output for x in requests]
        async with RouterInProcess(layer_of(packs, ["good"] * E, combine=method)) as mesh:
            replies = await asyncio.gather(*(mesh.ask(x) for x in requests))
            assert mesh.router.telemetry.batches["l"] < len(requests)
        for reply, rows in zip(replies, expected, strict=True):
            torch.testing.assert_close(reply.output, rows)

    run_async(main())


def test_bytes_copied_are_those_of_the_rows_that_are_sent() -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))

    async def main() -> None:
        async with RouterInProcess(layer_of([None] * E, ["good"] * E)) as mesh:
            await mesh.ask(x)
            assert mesh.router.telemetry.copied == 3 * x.nbytes  # a row for each of its three experts, and no more
        async with RouterInProcess(layer_of(["p"] * E, ["good"] * E)) as mesh:
            await mesh.ask(x)
            assert mesh.router.telemetry.copied == 0  # it takes all rows: they are sent from where they lie

    run_async(main())


def test_experts_of_a_pack_that_answer_with_unlike_rows_are_refused() -> None:
    experts = {
        "a": Expert.from_function(lambda rows: rows, pack="p"),
        "b": Expert.from_function(lambda rows: rows[:, :2], pack="p"),
    }
    layer = Layer("l", gates.Fixed([0.5, 0.5]), experts, input=TensorSpec((D,)))

    async def main() -> None:
        async with RouterInProcess(layer) as mesh:
            with pytest.raises(SpecMismatch, match="rows of different shapes"):
                await mesh.ask(torch.ones(2, D))

    run_async(main())


def test_a_pack_goes_to_one_replica_that_holds_all_of_it() -> None:
    layer = layer_of(["p"] * E, ["good"] * E)
    two = layer.with_experts(
        {name: Expert.from_function(times(n + 1.0), pack="p", replicas=2) for n, name in enumerate(layer.experts)}
    )
    x = torch.ones(3, D)

    async def main() -> None:
        async with RouterInProcess(two) as mesh:
            for _ in range(20):
                await mesh.ask(x)
            assert sum(mesh.router.telemetry.messages.values()) == 20
            assert len(mesh.router.telemetry.messages) == 2

    run_async(main())
