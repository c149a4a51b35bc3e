"""One cluster of several layers on real Ray actors and real gRPC: right answers, merged messages, nothing mixed up."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh import AsyncClient, Client, Cluster, Expert, Layer, TensorSpec, gates

pytestmark = pytest.mark.ray
SLEEP = 0.1
LONG = 4096.0
MEET = 8192.0
MEET_SECONDS = 20.0


class Conv(nn.Module):
    """A whole small model over rows [1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


class Scale(nn.Module):
    """Per-pixel scale, a torch module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 64).reshape(1, 8, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.scale


def squared(rows: np.ndarray) -> np.ndarray:
    """A numpy function."""
    return np.square(rows) - 1


def sleepy(folder: Path, experts: int) -> Expert:
    """An expert that takes a tenth of a second, however many rows; fifty times as long for rows of `LONG`.

    For rows of `MEET` it waits until all the `experts`, each of which is a process, compute such rows.
    """

    def compute(rows: Tensor) -> Tensor:
        if bool((rows == MEET).any()):
            (folder / str(os.getpid())).touch()
            deadline = time.monotonic() + MEET_SECONDS
            while len(list(folder.iterdir())) < experts:
                if time.monotonic() > deadline:
                    raise RuntimeError("the others do not compute at the same time")
                threading.Event().wait(0.01)
        threading.Event().wait(SLEEP * (50 if bool((rows == LONG).any()) else 1))
        return rows + 1

    return Expert.from_function(compute, pack=None)


def constant(values: list[float]) -> Expert:
    """An expert that answers every row with the same values."""
    return Expert.from_function(lambda rows: torch.tensor([values]).expand(len(rows), len(values)))


def mixed_layer() -> Layer:
    torch.manual_seed(3)
    experts = {
        "scale": Expert.from_module(Scale()),
        "square": Expert.from_function(squared, framework="numpy"),
        "conv": Expert.from_module(Conv().eval()),
    }
    return Layer("mixed", gates.TopK(in_features=64, num_experts=3, k=2), experts, input=TensorSpec((1, 8, 8)))


def layers(folder: Path) -> list[Layer]:
    functions = {name: Expert(f"numpy:{name}") for name in ("sin", "cos", "tan")}
    return [
        Layer("s1", gates.Fixed([0.5, 0.5, 0.5]), functions),
        Layer("s8", gates.Fixed([0.6, 0.4]), {"one": constant([0.9, 0.1]), "two": constant([0.8, 0.2])}),
        mixed_layer(),
        Layer("slow", gates.Fixed([0.125] * 8), {f"e{i}": sleepy(folder, 8) for i in range(8)}),
    ]


@pytest.fixture(scope="module")
def cluster(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(
        layers(tmp_path_factory.mktemp("meet")), name="ray-layer", port=0, transport=transport
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoint) as connected:
        yield connected


def test_weighted_functions_of_the_first_article(client: Client) -> None:
    x = np.array([1.0, 2.0, 3.0])
    reply = client.call("s1", x)
    np.testing.assert_allclose(reply.output, 0.5 * (np.sin(x) + np.cos(x) + np.tan(x)), atol=1e-6)
    assert set(reply.versions) == {"s1/sin", "s1/cos", "s1/tan", "s1/gate"}
    assert not reply.degraded
    assert reply.epoch == 1


def test_the_counter_tells_which_way_the_rows_went(client: Client, transport: str) -> None:
    before = client.status()["router"]["rows_carried"]
    client.forward("s1", np.ones(5, dtype=np.float32))
    after = client.status()["router"]["rows_carried"]
    way = "unix" if transport == "channel" else transport
    assert after.keys() == {way}
    assert after[way] == before.get(way, 0) + 15


def test_worked_example_of_the_second_article(client: Client) -> None:
    output = client.forward("s8", np.zeros((1, 4), dtype=np.float32))
    np.testing.assert_allclose(output, [[0.86, 0.14]], atol=1e-6)
    assert int(output[0].argmax()) == 0


def in_one_process(x: Tensor, k: int) -> Tensor:
    """The same computation without expertmesh's router: every expert on every row, weighted by the gate's choice."""
    layer = mixed_layer()
    with torch.inference_mode():
        routing = layer.gate(x.flatten(1).float(), k=k)
        rows = x.float()
        answers = torch.stack([Scale()(rows), torch.from_numpy(squared(rows.numpy())), Conv().eval()(rows)], dim=1)
        weights = torch.zeros(len(x), 3).scatter(1, routing.indices_TK, routing.weights_TK)
        return (answers * weights[:, :, None, None, None]).sum(dim=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    k=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_unlike_experts_answer_as_one_process(client: Client, rows: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    reply = client.call("mixed", x, top_k=k, return_routing=True)
    assert reply.output.dtype == dtype
    assert reply.output.shape == x.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(reply.output.float(), in_one_process(x, k), atol=tolerance, rtol=tolerance)


def test_ten_thousand_rows(client: Client) -> None:
    x = torch.randn(10_000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(client.forward("mixed", x), in_one_process(x, 2), atol=1e-5, rtol=1e-5)


def test_a_thousand_requests_from_threads_are_not_mixed_up(client: Client) -> None:
    def call(number: int) -> None:
        x = np.full((number % 4 + 1,), number / 100)
        expected = 0.5 * (np.sin(x) + np.cos(x) + np.tan(x))
        np.testing.assert_allclose(client.forward("s1", x), expected, atol=1e-9)

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(call, range(1000)))) == 1000


def test_a_thousand_requests_from_asyncio_are_not_mixed_up(cluster: Cluster) -> None:
    async def main() -> int:
        async with AsyncClient(cluster.endpoint) as client:

            async def call(number: int) -> None:
                x = np.full((number % 4 + 1,), number / 100)
                expected = 0.5 * (np.sin(x) + np.cos(x) + np.tan(x))
                np.testing.assert_allclose(await client.forward("s1", x), expected, atol=1e-9)

            return len(await asyncio.gather(*(call(number) for number in range(1000))))

    assert asyncio.run(main()) == 1000


def test_the_experts_of_a_request_compute_at_the_same_time(client: Client) -> None:
    x = np.full((4, 2), MEET, dtype=np.float32)
    np.testing.assert_allclose(client.forward("slow", x, timeout=2 * MEET_SECONDS), x + 1)


def test_waiting_rows_travel_together(client: Client) -> None:
    def messages() -> dict[str, int]:
        return {name: n for name, n in client.status()["router"]["messages"].items() if name.startswith("slow/")}

    before = messages()
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda i: client.forward("slow", np.full((1, 2), i, np.float32)), range(64)))
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(answer, np.full((1, 2), number + 1.0))
    sent = {name: count - before[name] for name, count in messages().items()}
    assert len(sent) == 8
    assert max(sent.values()) <= 16, sent  # one at a time they are 64; how many wait together is the machine's affair


def test_a_slow_expert_delays_only_those_who_need_it(client: Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(client.forward, "slow", np.full((1, 2), LONG, dtype=np.float32))
        for _ in range(5):
            client.forward("s1", np.ones(3))
        assert not slow.done()
        slow.result()


def test_status_tells_where_each_expert_runs(client: Client) -> None:
    experts = client.status()["layers"]["s1"]["experts"]
    assert set(experts) == {"s1/sin", "s1/cos", "s1/tan"}
    for expert in experts.values():
        (replica,) = expert["replicas"]
        assert replica["state"] == "ready"
        assert replica["pid"] > 0
        assert replica["device"] == "cpu"
        assert expert["version"].startswith("v1-")
