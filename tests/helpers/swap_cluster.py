"""A cluster in this process whose answers are exact, and files to swap into it: every reply can be recomputed.

One expert answers each row: the gate's weights and the rows are whole numbers, no two scores are equal, and the weight
of the only choice is 1. Shapes: T rows, D = 4 features, E = 3 experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh import Client, Cluster, Expert, Layer, Reply, gates
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.weights.files import save_tensors

NAME = "swaps"
WIDTH, EXPERTS = 4, ("a", "b", "c")
IDS = tuple(f"l/{name}" for name in EXPERTS)
GATE = "l/gate"
X = np.array([[9, 2, 4, 1], [1, 8, 3, 2], [2, 5, 7, 3], [6, 1, 5, 4], [3, 2, 1, 9], [4, 7, 2, 5]], np.float32)


def matrix(seed: int) -> np.ndarray[Any, Any]:
    """Whole numbers [D, D], of which none is zero."""
    drawn = np.random.default_rng(seed).integers(1, 6, (WIDTH, WIDTH))
    return drawn.astype(np.float32)


def selection(seed: int) -> np.ndarray[Any, Any]:
    """The weights [E, D] of a gate: the score of each expert is another feature of the row."""
    order = np.random.default_rng(seed).permutation(WIDTH)
    return np.eye(WIDTH, dtype=np.float32)[order[: len(EXPERTS)]] * 2


class Weights:
    """Files with known contents, and which version each of them became."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[str, str], np.ndarray[Any, Any]] = {}

    def file(self, id: str, seed: int) -> Path:
        """A file for an expert or the gate."""
        array = selection(seed) if id == GATE else matrix(seed)
        path = self.folder / f"{id.replace('/', '_')}_{seed}.safetensors"
        save_tensors(path, {"weight": torch.from_numpy(array)})
        return path

    def files(self, seeds: Mapping[str, int]) -> dict[str, Path]:
        """Files for several ids."""
        return {id: self.file(id, seed) for id, seed in seeds.items()}

    def became(self, after: Mapping[str, str], seeds: Mapping[str, int]) -> None:
        """Note which versions they became."""
        for id, version in after.items():
            self.known[id, version] = selection(seeds[id]) if id == GATE else matrix(seeds[id])

    def expected(self, reply: Reply, x: np.ndarray[Any, Any] = X) -> np.ndarray[Any, Any]:
        """The answer that the versions of a reply give."""
        chosen = (x @ self.known[GATE, reply.versions[GATE]].T).argmax(axis=1)
        assert {IDS[e] for e in chosen} == reply.versions.keys() - {GATE}
        return np.stack(
            [self.known[IDS[e], reply.versions[IDS[e]]] @ row for e, row in zip(chosen, x, strict=True)]
        )  # fmt: skip

    def check(self, reply: Reply, x: np.ndarray[Any, Any] = X) -> None:
        """Recompute a reply."""
        assert np.array_equal(reply.output, self.expected(reply, x)), reply


def layer(weights: Weights, replicas: int = 1) -> Layer:
    """Three experts of one matrix each, and a gate that chooses one."""
    gate = gates.TopK(WIDTH, len(EXPERTS), k=1)
    gate.load_state_dict({"weight": torch.from_numpy(selection(0))})
    experts = {
        name: Expert(
            "torch.nn:Linear",
            args=(WIDTH, WIDTH),
            kwargs={"bias": False},
            weights=weights.file(f"l/{name}", number),
            replicas=replicas,
        )
        for number, name in enumerate(EXPERTS, start=1)
    }
    return Layer("l", gate, experts)


class SwapCluster:
    """A running cluster, a client of an admin, and the weights of its versions."""

    def __init__(self, cluster: Cluster, weights: Weights) -> None:
        self.cluster = cluster
        self.weights = weights
        self.client = Client(cluster.endpoint)
        self.state_dir = Path(str(cluster.config.state_dir))

    def call(self, **options: Any) -> Reply:
        """A call, recomputed."""
        reply = self.client.call("l", X, **options)
        self.weights.check(reply)
        return reply

    def current(self) -> dict[str, str]:
        """The version of every id."""
        return dict(self.cluster.status()["versions"])

    def swap(self, seeds: Mapping[str, int], **options: Any) -> Any:
        """Swap in files of these seeds; their versions are known from then on."""
        outcome = self.client.swap(self.weights.files(seeds), **options)
        self.weights.became(outcome.after, seeds)
        return outcome

    def as_role(self, role: Role) -> Client:
        """A client with the token of a role."""
        return Client(self.cluster.endpoint, token=read_token(token_path(NAME), role))

    def uploads(self) -> list[str]:
        """What lies among the uploads."""
        return [path.name for path in (self.state_dir / "uploads").iterdir()]


@contextmanager
def swap_cluster(
    folder: Path, replicas: int = 1, weights: Weights | None = None, **settings: Any
) -> Iterator[SwapCluster]:
    """Start the cluster; `weights` of an earlier start are still known."""
    made = weights or Weights(folder)
    options = {"transport": "local", "port": 0, "metrics_port": None, "name": NAME, "state_dir": folder / "state"}
    with Cluster.start([layer(made, replicas)], **(options | settings)) as cluster:
        running = SwapCluster(cluster, made)
        if weights is None:
            made.became(running.current(), {GATE: 0, "l/a": 1, "l/b": 2, "l/c": 3})
        with running.client:
            yield running
