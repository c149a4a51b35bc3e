"""A stored version that rots stops its own expert alone: the others start and serve, and a swap heals it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.swap_cluster import GATE, SwapCluster, Weights, X, layer, swap_cluster

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.cluster.state.version_folders import MANIFEST, WEIGHTS
from expertmesh.experts.errors import DataLoss, ExpertMeshError

pytestmark = pytest.mark.usefixtures("own_home")


def folder_of(state_dir: Path, id: str, version: str) -> Path:
    return state_dir / "versions" / id / version


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.chmod(0o600)
    path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": lambda folder: overwrite(folder / WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "weights cut short": lambda folder: overwrite(folder / WEIGHTS, lambda data: data[:-9]),
    "weights removed": lambda folder: (folder / WEIGHTS).unlink(),
    "manifest": lambda folder: overwrite(folder / MANIFEST, lambda data: data[:20]),
}


def restarted(
    folder: Path, damage: Callable[[Path], object], ids: list[str], story: Callable[[SwapCluster], Any]
) -> Any:
    """Swap `ids`, stop, damage their current versions, start again and tell a story."""
    weights = Weights(folder)
    with swap_cluster(folder) as running:
        weights.known = running.weights.known
        running.weights = weights
        for number, id in enumerate(ids, start=20):
            running.swap({id: number})
        versions, state_dir = running.current(), running.state_dir
    for id in ids:
        damage(folder_of(state_dir, id, versions[id]))
    with swap_cluster(folder, weights=weights, start_timeout=20) as running:
        assert running.current() == versions
        return story(running)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_others_serve_and_a_swap_heals_it(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    def story(running: SwapCluster) -> None:
        broken = running.client.status()["broken"]
        assert list(broken) == ["l/b"]
        assert "of l/b is damaged: " in broken["l/b"]
        reply = running.client.call("l", X, deny=["b"])
        assert "l/b" not in reply.versions
        with pytest.raises(ExpertMeshError, match="l/b"):
            running.client.call("l", X)
        running.swap({"l/b": 30})
        running.call()
        assert running.client.status()["broken"] == {}

    restarted(tmp_path, damage, ["l/b"], story)


def test_a_damaged_gate_stops_its_own_layer_alone(tmp_path: Path) -> None:
    weights = Weights(tmp_path)
    other = Layer("other", gates.Fixed([1.0]), {"e": Expert("numpy:sin")})
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": "two", "state_dir": tmp_path / "state"}
    with Cluster.start([layer(weights), other], **options) as cluster, Client(cluster.endpoint) as client:
        version = client.swap({GATE: weights.file(GATE, 20)}).after[GATE]
    DAMAGE["weights cut short"](folder_of(tmp_path / "state", GATE, version))
    said: list[str] = []
    with (
        Cluster.start([layer(weights), other], progress=said.append, **options) as cluster,
        Client(cluster.endpoint) as client,
    ):
        assert client.forward("other", [0.0]).tolist() == [0.0]
        assert list(client.status()["broken"]) == [GATE]
        assert any(line.startswith(f"{GATE} is broken and does not serve: ") for line in said)
        with pytest.raises(ExpertMeshError):
            client.call("l", X)
        client.swap({GATE: weights.file(GATE, 21)})
        assert client.call("l", X).output.shape == X.shape


def test_a_start_at_which_nothing_can_serve_says_why(tmp_path: Path) -> None:
    ids = ["l/a", "l/b", "l/c"]
    with pytest.raises(DataLoss, match=r"l/a.*is damaged"):
        restarted(tmp_path, DAMAGE["a bit of the weights"], ids, lambda running: None)
