"""What is taken out of the configuration does not hold up the next start, and nothing of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.experts.errors import FailedPrecondition

pytestmark = pytest.mark.usefixtures("own_home")
X = np.array([0.5, 1.0])


def layer(name: str, *shared: str, factory: str = "numpy:sin") -> Layer:
    beside = {each: Expert("numpy:cos") for each in shared}
    return Layer(name, gates.Fixed([1.0]), {"e": Expert(factory)}, shared=beside)


def started(folder: Path, *layers: Layer, **more: Any) -> Cluster:
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": "n", "state_dir": folder, "start_timeout": 20}
    return Cluster.start(layers, **(options | more))


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [
        ([layer("a"), layer("b")], [layer("a")], {"b/e", "b/gate"}),
        ([layer("a", "s")], [layer("a")], {"a/s"}),
        ([layer("a"), layer("b")], [layer("a", factory="numpy:tanh")], {"b/e", "b/gate"}),
    ],
    ids=["a layer", "a shared expert", "a layer, and another is edited"],
)
def test_a_start_without_it_serves_the_rest(
    tmp_path: Path, before: list[Layer], after: list[Layer], gone: set[str]
) -> None:
    with started(tmp_path, *before) as cluster:
        versions = cluster.status()["versions"]
    with started(tmp_path, *after) as cluster, Client(cluster.endpoint) as client:
        assert client.forward("a", X).shape == X.shape
        assert cluster.status()["versions"].keys() == versions.keys() - gone
        assert client.status()["not_declared"] == {id: versions[id] for id in gone}
        kept = client.history(min(gone))
        assert [(entry["version"], entry["declared"], entry["current"]) for entry in kept] == [
            (versions[min(gone)], False, False)
        ]
        with pytest.raises(FailedPrecondition, match="it is not declared"):
            client.rollback(min(gone))


def test_what_is_declared_again_serves_what_was_swapped_in(tmp_path: Path) -> None:
    both = [layer("a"), layer("b")]
    with started(tmp_path, *both) as cluster:
        cluster.replace("b/e", Expert("numpy:cos"), allow_unverified=True)
        versions = cluster.status()["versions"]
    with started(tmp_path, both[0], retain_epochs=0) as cluster:
        for factory in ("numpy:tan", "numpy:exp"):
            cluster.replace("a/e", Expert(factory), allow_unverified=True)
    with started(tmp_path, *both) as cluster, Client(cluster.endpoint) as client:
        assert cluster.status()["versions"]["b/e"] == versions["b/e"]
        np.testing.assert_allclose(client.forward("b", X), np.cos(X))
        np.testing.assert_allclose(client.forward("a", X), np.exp(X))
        assert client.status()["not_declared"] == {}


def test_an_older_epoch_that_names_it_can_still_be_called(tmp_path: Path) -> None:
    with started(tmp_path, layer("a"), layer("b")) as cluster:
        first = cluster.status()["epoch"]
    with started(tmp_path, layer("a")) as cluster, Client(cluster.endpoint) as client:
        cluster.replace("a/e", Expert("numpy:tan"), allow_unverified=True)
        np.testing.assert_allclose(client.call("a", X, epoch=first).output, np.sin(X))


def of(count: int) -> Layer:
    return Layer("a", gates.Fixed([1.0] * count), {f"e{n}": Expert("numpy:sin") for n in range(count)})


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_a_layer_with_fewer_or_more_experts_starts(tmp_path: Path, before: int, after: int) -> None:
    started(tmp_path, of(before)).stop()
    with started(tmp_path, of(after)) as cluster, Client(cluster.endpoint) as client:
        np.testing.assert_allclose(client.forward("a", X), after * np.sin(X))


def test_a_gate_that_was_swapped_for_more_experts_says_what_to_do(tmp_path: Path) -> None:
    with started(tmp_path, of(3)) as cluster, Client(cluster.endpoint) as client:
        path = tmp_path / "gate.safetensors"
        gates.Fixed([3.0, 2.0, 1.0]).save(path)
        client.swap({"a/gate": path})
    with pytest.raises(FailedPrecondition, match=r"a/gate.*Name it in `redeclare` to replace"):
        started(tmp_path, of(2))
    started(tmp_path, of(2), redeclare=["a/gate"]).stop()
