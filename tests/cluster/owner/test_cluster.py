"""A cluster as its owner sees it, within this process: what it says of itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from expertmesh import Client, Cluster, Expert, FailedPrecondition, Layer, gates

pytestmark = pytest.mark.usefixtures("own_home")


def layer(name: str) -> Layer:
    return Layer(name, gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})


def test_a_cluster_shows_what_it_is_and_whether_it_runs() -> None:
    with Cluster.start([layer("news")], transport="local", port=0, name="shown") as cluster:
        told = f"Cluster(name='shown', endpoint='{cluster.endpoint}', layers=['news'], "
        assert cluster.endpoint
        assert repr(cluster) == f"{told}running)"
    assert repr(cluster) == f"{told}stopped)"


def test_many_layers_are_counted() -> None:
    with Cluster.start([layer(f"l{n}") for n in range(9)], transport="local", port=0, name="shown") as cluster:
        assert ", layers={9 layers}, running)" in repr(cluster)


def test_a_second_cluster_on_a_state_dir_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0, "state_dir": tmp_path / "state"}
    with Cluster.start([layer("news")], name="first", **options) as first, Client(first.endpoint) as client:
        with pytest.raises(FailedPrecondition, match=f"in use by cluster 'first' \\(pid {os.getpid()} "):
            Cluster.start([layer("news")], name="second", **options)
        assert client.forward("news", [0.0]).tolist() == [0.0]
    Cluster.start([layer("news")], name="second", **options).stop()
