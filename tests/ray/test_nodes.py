"""A Ray of two nodes that runs already: joined, with an expert whose code is on the second, and routers on both."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.waiting import eventually

from expertmesh import Client, Cluster, ConfigError, Expert, ExpertMeshError, Layer, gates
from expertmesh.cluster.machine.run_files import RunFile, token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role
from expertmesh.cluster.runtime import backend
from expertmesh.cluster.runtime.ray_environment import load_backend

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_nodes(nothing_left: None) -> Iterator[Any]:
    load_backend(None)  # as a private Ray would have it: with its token, before Ray is imported
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.second = nodes.add_node(num_cpus=1, resources={"second": 1})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def _state(status: dict[str, Any]) -> tuple[str, str]:
    (there,) = status["layers"]["far"]["experts"]["far/there"]["replicas"]
    return there["state"], there["problem"]


def test_code_from_a_folder_runs_on_the_second_node(two_nodes: Any, tmp_path: Path, transport: str) -> None:
    (tmp_path / "my_experts.py").write_text(
        textwrap.dedent("""
            def tripled(rows):
                return rows * 3
        """)
    )
    layer = Layer(
        "far",
        gates.Fixed([1.0, 1.0]),
        {
            "here": Expert("numpy:negative"),
            "there": Expert(
                "my_experts:tripled",
                resources={"second": 1},
                runtime_env={"working_dir": str(tmp_path), "env_vars": {"OMP_NUM_THREADS": "1"}},
            ),
        },
    )
    options = {"port": 0, "transport": transport, "address": two_nodes.address}
    with Cluster.start([layer], name="two-nodes", **options) as cluster:
        with Client(cluster.endpoint) as client:
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            np.testing.assert_allclose(client.forward("far", x), 2 * x)
            status = client.status()
        carried, experts = status["router"]["rows_carried"], status["layers"]["far"]["experts"]
        if transport == "channel":  # the other expert may stand on either node
            assert carried["tcp"] >= 2
            assert sum(carried.values()) == 4
        else:
            assert carried == {"ray": 4}
        (there,) = experts["far/there"]["replicas"]
        assert there["node"].endswith(two_nodes.second.node_id[:8])
        two_nodes.remove_node(two_nodes.second)
        with Client(cluster.endpoint) as client:
            eventually(lambda: _state(client.status())[0] == "waiting", 90, "the replica waits for its node")
            assert _state(client.status()) == ("waiting", "it waits for a node with second=1")
            with pytest.raises(ExpertMeshError, match="waits for a node with second=1"):
                client.forward("far", x, allow=["there"], timeout=5.0)
        two_nodes.second = two_nodes.add_node(num_cpus=1, resources={"second": 1})
    gpu = Layer("gpu", gates.Fixed([1.0]), {"e": Expert("numpy:negative", num_gpus=1)})
    with pytest.raises(ConfigError, match="num_gpus"):
        Cluster.start([gpu], name="no-gpu", **options)
    assert len(two_nodes.list_all_nodes()) == 2  # a Ray that was joined is left as it was


def test_routers_on_both_nodes_reach_every_replica(
    two_nodes: Any, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "is_loopback", lambda host: False)  # both nodes are on this machine
    experts = {"here": Expert("numpy:negative"), "there": Expert("numpy:negative", resources={"second": 1})}
    layer = Layer("far", gates.Fixed([1.0, 1.0]), experts)
    options = {"port": 0, "transport": transport, "address": two_nodes.address, "routers": 3}
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Cluster.start([layer], name="spread", **options) as cluster:
        token, run = read_token(token_path("spread"), Role.ADMIN), RunFile.read("spread")
        nodes = []
        for endpoint, socket in zip(cluster.endpoints, run.sockets, strict=True):
            with Client(endpoint, token=token) as client:
                np.testing.assert_allclose(client.forward("far", x), -2 * x)
                status = client.status()
            own, experts_now = status["router"], status["layers"]["far"]["experts"].values()
            assert own["endpoint"] == endpoint
            nodes.append(own["node"])
            assert bool(socket) == (own["node"] == nodes[0]), run
            if transport == "channel":
                near = [replica["node"] == own["node"] for expert in experts_now for replica in expert["replicas"]]
                assert own["rows_carried"] == {
                    way: 2 * count for way, count in (("unix", near.count(True)), ("tcp", near.count(False))) if count
                }
