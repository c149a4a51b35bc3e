"""A router of this process has the methods of a client, and answers without a message: arrays, errors, threads, end."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.attached import Home, attached
from helpers.waiting import eventually

from expertmesh import AsyncClient, Client, Expert, Layer, errors, gates
from expertmesh.cluster.attach.router import AsyncAttachedRouter, AttachedRouter
from expertmesh.cluster.client import sending
from expertmesh.cluster.gateway import frames, gateway

X = np.array([[9, 2, 4], [1, 8, 3], [2, 5, 7], [6, 1, 5]], np.float32)
SLOW = threading.Event()


class Slow(torch.nn.Module):
    """Waits for the test."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SLOW.wait(20)
        return x


def layer() -> Layer:
    experts = {
        "a": Expert("torch:abs"),
        "b": Expert("torch:neg"),
        "c": Expert("torch:square"),
        "s": Expert("torch:sin"),
    }
    return Layer("l", gates.Fixed([0.5, 0.25, 0.125, 0.125]), experts)


def answer(x: Any) -> Any:
    """What the layer computes."""
    return 0.5 * abs(x) - 0.25 * x + 0.125 * x * x + 0.125 * np.sin(x)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AttachedRouter, Home]]:
    with attached(layer(), tmp_path_factory.mktemp("state")) as made:
        yield made


@pytest.fixture
def router(both: tuple[AttachedRouter, Home]) -> AttachedRouter:
    return both[0]


def test_it_has_the_methods_of_a_client_with_the_same_arguments() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in found if name[0] != "_"}

    assert methods(AttachedRouter) == methods(Client)
    assert methods(AsyncAttachedRouter) == {
        name: them for name, them in methods(AsyncClient).items() if name != "close"
    }
    assert all(getattr(AttachedRouter, name).__doc__ for name in methods(AttachedRouter))


def test_numpy_and_torch_come_back_as_they_went(router: AttachedRouter) -> None:
    reply = router.call("l", X)
    assert isinstance(reply.output, np.ndarray)
    np.testing.assert_allclose(reply.output, answer(X), rtol=1e-6)
    assert reply.versions.keys() == {"l/a", "l/b", "l/c", "l/s", "l/gate"}
    assert (reply.epoch, reply.cluster, reply.degraded, reply.max_lost_mass) == (1, "c", False, 0.0)
    y = router.forward("l", torch.from_numpy(X))
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, torch.from_numpy(reply.output))
    half = router.forward("l", torch.from_numpy(X).bfloat16())
    assert half.dtype == torch.bfloat16
    assert router.forward("l", X[:0]).shape == (0, 3)


def test_an_array_need_not_be_contiguous(router: AttachedRouter) -> None:
    wide = torch.from_numpy(np.repeat(X, 2, axis=1))[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(router.forward("l", wide), router.forward("l", torch.from_numpy(X)))


def test_the_options_of_a_call_reach_the_router(router: AttachedRouter) -> None:
    reply = router.call("l", X, allow=["a"], return_routing=True, request_id="mine")
    np.testing.assert_array_equal(reply.output, 0.5 * abs(X))
    assert (reply.request_id, reply.indices.tolist()) == ("mine", [[0, -1, -1, -1]] * 4)
    own = router.call("l", X, top_k_index=np.full((4, 1), 1), top_k_weights=np.ones((4, 1), np.float32))
    np.testing.assert_array_equal(own.output, -X)
    assert own.versions.keys() == {"l/b"}
    assert router.call("l", X, epoch=1, stream=True, timeout=5.0).epoch == 1


def test_rows_are_neither_encoded_nor_decoded(router: AttachedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*anything: Any, **more: Any) -> Any:
        raise AssertionError("a message was made")

    for module, name in ((sending, "encode_parts"), (frames, "encode_parts"), (sending, "decode"), (gateway, "decode")):
        monkeypatch.setattr(module, name, refused)
    np.testing.assert_allclose(router.forward("l", X), answer(X), rtol=1e-6)
    with pytest.raises(AssertionError):
        router.status()


def test_the_arrays_of_a_reply_are_the_callers_own(router: AttachedRouter) -> None:
    x = torch.from_numpy(X.copy())
    first, second = router.forward("l", x), router.forward("l", x)
    kept = second.clone()
    first.zero_()
    x.zero_()
    assert torch.equal(second, kept)
    assert not first.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (second * weight).sum().backward()  # type: ignore[no-untyped-call] # what autograd saves is a usual tensor
    assert weight.grad is not None


def test_answers_of_one_batch_do_not_share_memory(router: AttachedRouter) -> None:
    async def all_at_once() -> list[Any]:
        return list(await asyncio.gather(*(router.aio.forward("l", torch.from_numpy(X)) for _ in range(20))))

    outputs = asyncio.run(all_at_once())
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 20
    assert all(output.untyped_storage().nbytes() == X.nbytes for output in outputs)


def test_threads_and_event_loops_share_it(router: AttachedRouter) -> None:
    def call(seed: int) -> bool:
        x = np.random.default_rng(seed).standard_normal((5, 3)).astype(np.float32)
        return all(np.allclose(router.forward("l", x), answer(x), rtol=1e-4, atol=1e-5) for _ in range(10))

    async def calls() -> bool:
        outputs = await asyncio.gather(*(router.aio.forward("l", X) for _ in range(20)))
        return all(np.allclose(output, answer(X), rtol=1e-5) for output in outputs)

    with ThreadPoolExecutor(6) as threads:
        blocking = [threads.submit(call, seed) for seed in range(6)]
        awaiting = [threads.submit(asyncio.run, calls()) for _ in range(2)]
        assert all(done.result(60) for done in [*blocking, *awaiting])


def test_a_lease_holds_the_epoch_for_several_calls(router: AttachedRouter) -> None:
    with router.pin() as lease:
        assert router.call("l", X, pin=lease).epoch == lease.epoch == 1
        assert router.status()["router"]["leases"] == 1
    assert router.leases() == []
    with pytest.raises(errors.FailedPrecondition, match="lease"):
        router.call("l", X, pin=lease)

    async def pinned() -> int:
        async with router.aio.pin() as held:
            return (await router.aio.call("l", X, pin=held)).epoch

    assert asyncio.run(pinned()) == 1


def test_its_status_and_health_are_those_of_a_router(router: AttachedRouter) -> None:
    status = router.status()
    assert (status["name"], status["epoch"], status["state"]) == ("test", 1, "serving")
    assert status["router"]["pid"] == os.getpid()
    assert router.health() == router.health("l") == "SERVING"
    assert asyncio.run(router.aio.health("nosuch")) == "SERVICE_UNKNOWN"
    assert [entry["current"] for entry in router.history("l/a")] == [True]


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (errors.NotFound, lambda router: router.call("nosuch", X)),
        (errors.NotFound, lambda router: router.history("l/nosuch")),
        (errors.NotFound, lambda router: router.call("l", X, epoch=7)),
        (errors.InvalidRequest, lambda router: router.call("l", None)),
        (errors.InvalidRequest, lambda router: router.call("l", np.float32(1))),
        (errors.InvalidRequest, lambda router: router.call("l", X, allow=["l/nosuch"])),
        (errors.InvalidRequest, lambda router: router.call("l", X, top_k="two")),
        (errors.InvalidRequest, lambda router: router.call("l", X, request_id="with a blank")),
        (errors.InvalidRequest, lambda router: router.call("l", X, timeout=0)),
        (errors.TooLarge, lambda router: router.call("l", np.zeros((70_000, 3), np.float32))),
    ],
)
def test_errors_have_the_types_of_a_clients(
    router: AttachedRouter, kind: type[Exception], call: Callable[[AttachedRouter], object]
) -> None:
    with pytest.raises(kind):
        call(router)
    np.testing.assert_allclose(router.forward("l", X), answer(X), rtol=1e-6)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[AttachedRouter, Home]]:
    SLOW.clear()
    experts = {"e": Expert(f"{__name__}:Slow")}
    with attached(Layer("l", gates.Fixed([1.0]), experts), tmp_path, max_rows_in_flight=16) as made:
        yield made
        SLOW.set()
    SLOW.set()


def test_a_deadline_and_the_bound_of_rows_hold(slow: tuple[AttachedRouter, Home]) -> None:
    router, _ = slow
    with pytest.raises(errors.DeadlineExceeded):
        router.call("l", X, timeout=0.05)
    waiting = threading.Thread(target=lambda: router.forward("l", np.zeros((12, 3), np.float32)))
    waiting.start()
    eventually(lambda: router.status()["router"]["rows_in_flight"] == 12, 20, "the rows are in flight")
    with pytest.raises(errors.Overloaded):
        router.call("l", X)
    SLOW.set()
    waiting.join(30)
    assert not waiting.is_alive()


def test_who_cancels_a_call_ends_it_in_the_router(slow: tuple[AttachedRouter, Home]) -> None:
    router, _ = slow

    async def cancelled() -> None:
        call = asyncio.ensure_future(router.aio.forward("l", X))
        while not (await router.aio.status())["router"]["rows_in_flight"]:
            await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while (await router.aio.status())["router"]["rows_in_flight"]:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(cancelled(), 20))


def test_closing_fails_what_is_in_flight_and_leaves_the_cluster_once(slow: tuple[AttachedRouter, Home]) -> None:
    router, home = slow
    failed: list[BaseException] = []

    def call() -> None:
        try:
            router.forward("l", X)
        except errors.ExpertMeshError as error:
            failed.append(error)

    calls = [threading.Thread(target=call) for _ in range(2)]
    for thread in calls:
        thread.start()
    eventually(lambda: router.status()["router"]["rows_in_flight"] == 8, 20, "both are in flight")
    assert len(home.members) == 1
    router.close()
    router.close()
    for thread in calls:
        thread.join(30)
    assert [type(error) for error in failed] == [errors.FailedPrecondition] * 2
    assert (home.members, home.closed) == ([], 1)
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        router.status()
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        asyncio.run(router.aio.forward("l", X))
    assert "closed" in repr(router)


def test_a_forked_process_is_refused_and_does_not_leave_for_its_parent(both: tuple[AttachedRouter, Home]) -> None:
    router, home = both
    child = os.fork()
    if child == 0:  # the child must not run what pytest does at an exit
        code = 1
        try:
            router.close()
            router.forward("l", X)
        except errors.FailedPrecondition as error:
            code = 0 if "forked" in error.message else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(home.members) == 1
    np.testing.assert_allclose(router.forward("l", X), answer(X), rtol=1e-6)
