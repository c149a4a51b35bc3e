"""Every gate and combine method through a live cluster, from YAML and Python, and mixed options in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expertmesh import Client, Cluster, Expert, InvalidRequest, Layer, gates
from expertmesh.router.gates import Gate
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.local import LocalLayer

D, E, T = 8, 4, 12
GATES: dict[str, dict[str, Any]] = {
    "top_k": {"in_features": D, "num_experts": E, "k": 2},
    "fixed": {"weights": [0.5, 0.25, 0.125, 0.125]},
    "switch": {"in_features": D, "num_experts": E},
    "noisy_top_k": {"in_features": D, "num_experts": E, "k": 2},
    "sigmoid": {"in_features": D, "num_experts": E, "k": 2},
    "threshold": {"in_features": D, "num_experts": E},
    "top_p": {"in_features": D, "num_experts": E},
    "expert_choice": {"in_features": D, "num_experts": E},
    "hash": {"num_experts": E},
    "cosine": {"in_features": D, "num_experts": E},
}


def scale(factor: float) -> Expert:
    return Expert.from_function(lambda rows: rows * factor)


def experts() -> dict[str, Expert]:
    return {f"e{i}": scale(1.0 + i) for i in range(E)}


def functions() -> dict[str, Any]:
    return {name: expert.live for name, expert in experts().items()}


def rows(seed: int = 0, count: int = T) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


class Scores(nn.Module):
    """A custom scorer: any module that returns scores."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD[:, :E]


def make_gate(name: str) -> Gate:
    torch.manual_seed(len(name))
    return gates.build(name, **GATES[name]).eval()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    layers = [Layer(name, make_gate(name), experts()) for name in GATES]
    layers.append(Layer("custom", gates.Custom(Scores(), num_experts=E, k=2), experts()))
    layers += [Layer(method, make_gate("top_k"), experts(), combine=method) for method in ("mean", "vote", "residual")]
    layers += [
        Layer(f"drop-{drop}", make_gate("top_k"), experts(), capacity=Capacity(factor=0.5, drop=drop), on_dropped=to)
        for drop, to in (("position", "zero"), ("probability", "residual"))
    ]
    layers.append(Layer("shared", make_gate("top_k"), experts(), shared={"always": scale(-0.5), "too": scale(0.25)}))
    with (
        Cluster.start(layers, name="options", port=0, transport="local") as cluster,
        Client(cluster.endpoint) as connected,
    ):
        yield connected


@pytest.mark.parametrize("name", sorted(set(gates.GATES) - {"custom"}))
def test_gate_through_a_cluster(client: Client, name: str) -> None:
    local = LocalLayer(make_gate(name), functions())
    reply = client.call(name, rows(), return_routing=True)
    torch.testing.assert_close(reply.output, local(rows()), atol=1e-6, rtol=1e-6)
    routing = make_gate(name)(rows())
    assert torch.equal(reply.indices, routing.indices_TK)
    torch.testing.assert_close(reply.weights, routing.weights_TK)


def test_custom_gate_through_a_cluster(client: Client) -> None:
    local = LocalLayer(gates.Custom(Scores(), num_experts=E, k=2), functions())
    torch.testing.assert_close(client.forward("custom", rows()), local(rows()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["mean", "vote", "residual"])
def test_combine_through_a_cluster(client: Client, method: str) -> None:
    local = LocalLayer(make_gate("top_k"), functions(), method=method)
    answer = client.forward(method, rows())
    torch.testing.assert_close(answer, local(rows()).to(answer.dtype), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("drop", "policy"), [("position", "zero"), ("probability", "residual")])
def test_capacity_through_a_cluster(client: Client, drop: str, policy: str) -> None:
    local = LocalLayer(
        make_gate("top_k"), functions(), capacity=Capacity(factor=0.5, drop=drop), on_dropped=policy
    ).answer(rows())
    reply = client.call(f"drop-{drop}", rows())
    torch.testing.assert_close(reply.output, local.output, atol=1e-6, rtol=1e-6)
    assert local.dropped_T is not None
    assert reply.dropped == int(local.dropped_T.sum()) > 0
    assert reply.degraded


def test_shared_experts_are_always_on(client: Client) -> None:
    local = LocalLayer(make_gate("top_k"), functions())
    reply = client.call("shared", rows())
    torch.testing.assert_close(reply.output, local(rows()) - 0.25 * rows(), atol=1e-6, rtol=1e-6)
    assert {"shared/always", "shared/too"} <= set(reply.versions)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"deny": ["top_k/e0"]},
    {"allow": ["e1", "e2"], "top_k": 1},
    {"on_missing": "renormalize"},
    {"deny": ["e3"], "on_missing": "fallback:e1"},
]


def test_each_request_in_a_batch_keeps_its_own_options(client: Client) -> None:
    local = LocalLayer(make_gate("top_k"), functions())

    def expected(number: int) -> Tensor:
        options = OPTIONS[number % len(OPTIONS)]
        names = [f"e{i}" for i in range(E)]
        allowed = [name.removeprefix("top_k/") for name in options.get("allow", names)]
        denied = [name.removeprefix("top_k/") for name in options.get("deny", [])]
        mask = torch.tensor([name in allowed and name not in denied for name in names])
        return local(rows(number, 3), mask_TE=mask, k=options.get("top_k"))

    def call(number: int) -> None:
        options = OPTIONS[number % len(OPTIONS)]
        reply = client.call("top_k", rows(number, 3), **options)
        torch.testing.assert_close(reply.output, expected(number), atol=1e-6, rtol=1e-6)
        for name in options.get("deny", []):
            assert f"top_k/{name.removeprefix('top_k/')}" not in reply.versions

    before = client.status()["router"]
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(call, range(256)))
    after = client.status()["router"]
    assert after["requests"] - before["requests"] == 256
    assert after["batches"]["top_k"] - before["batches"]["top_k"] < 256  # some shared a batch


def test_a_row_without_an_expert_is_rejected(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="leave no expert"):
        client.call("top_k", rows(), allow=["e0"], deny=["e0"])


def test_a_routing_of_the_caller_is_used(client: Client) -> None:
    indices = torch.tensor([[0, 3], [2, -1]])
    weights = torch.tensor([[0.5, 0.25], [2.0, 0.0]])
    reply = client.call("top_k", rows(0, 2), top_k_index=indices, top_k_weights=weights)
    x = rows(0, 2)
    torch.testing.assert_close(reply.output, torch.stack([x[0] * (0.5 + 0.25 * 4), x[1] * 2 * 3]))
    assert "top_k/gate" not in reply.versions


def test_every_gate_from_yaml(tmp_path: Path) -> None:
    lines = ["name: from-yaml", "port: 0", "transport: local", "layers:"]
    for name, arguments in GATES.items():
        make_gate(name).save(tmp_path / f"{name}.safetensors")
        arguments_text = "".join(f", {key}: {value}" for key, value in arguments.items())
        weights = f", weights: {name}.safetensors" if make_gate(name).state_dict() and name != "fixed" else ""
        lines += [
            f"  {name}:",
            f"    gate: {{type: {name}{arguments_text}{weights}}}",
            "    shared:",
            '      always: {factory: "numpy:negative"}',
            "    capacity: {factor: 4.0, drop: probability}",
            "    experts:",
            *(f'      e{i}: {{factory: "torch:{f}"}}' for i, f in enumerate(("sin", "cos", "tanh", "relu"))),
        ]
    path = tmp_path / "mesh.yaml"
    path.write_text("\n".join(lines) + "\n")
    four = [torch.sin, torch.cos, torch.tanh, torch.relu]
    with Cluster.from_config(path) as cluster, Client(cluster.endpoint) as client:
        for name in GATES:
            local = LocalLayer(make_gate(name), four, capacity=Capacity(factor=4.0, drop="probability"))
            expected = local(rows()) - rows()
            torch.testing.assert_close(client.forward(name, rows()), expected, atol=1e-6, rtol=1e-6)


def test_numpy_rows_through_every_gate(client: Client) -> None:
    x = rows().numpy()
    for name in GATES:
        answer = client.forward(name, x)
        assert isinstance(answer, np.ndarray)
        assert answer.dtype == np.float32
        assert np.isfinite(answer).all()
