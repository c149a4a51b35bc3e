"""A local cluster whose experts are feed-forward modules, with a client and an attached router, to be trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.attached import attached_to
from torch import Tensor, nn

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, gates
from expertmesh.cluster.attach.router import AttachedRouter
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import save_module, tensors_from_bytes

WIDTH, HIDDEN, OUT = 6, 8, 6
NAMES = itertools.count()


def module(seed: int, dtype: torch.dtype = torch.float32) -> FeedForward:
    """The expert of a seed."""
    torch.manual_seed(seed)
    return FeedForward(WIDTH, HIDDEN, out_features=OUT).to(dtype)


def layer_of(folder: Path, gate: gates.Gate, dtype: torch.dtype = torch.float32, **options: Any) -> Layer:
    """Layer l of as many experts as the gate takes, e0, e1, ..., whose seeds are their numbers."""
    experts = {}
    name = str(dtype).removeprefix("torch.")
    shared = options.pop("shared", ())
    more = {key: options.pop(key) for key in ("replicas", "pack") if key in options}
    for number, expert in enumerate([*(f"e{n}" for n in range(gate.num_experts)), *shared]):
        path = folder / f"{expert}.{name}.safetensors"
        save_module(path, module(number, dtype))
        rows = TensorSpec((WIDTH,), name)
        experts[expert] = Expert(
            "helpers.trained:build", args=(name,), weights=path, input=rows, output=TensorSpec((OUT,), name), **more
        )
    own = {name: experts.pop(name) for name in shared}
    return Layer("l", gate, experts, shared=own, input=TensorSpec((WIDTH,), name), **options)


def build(dtype: str) -> nn.Module:
    """The factory of the experts."""
    return FeedForward(WIDTH, HIDDEN, out_features=OUT).to(getattr(torch, dtype))


@dataclass
class Trained:
    """A running cluster; `doors` are the client and the attached router."""

    cluster: Cluster
    client: Client
    attached: AttachedRouter
    name: str
    state_dir: Path

    @property
    def doors(self) -> Mapping[str, Any]:
        return {"client": self.client, "attached": self.attached}


@contextmanager
def trained_cluster(folder: Path, layer: Layer, **settings: Any) -> Iterator[Trained]:
    """Start a cluster of this process."""
    state, name = folder / "state", f"trained-{next(NAMES)}"
    options = {"transport": "local", "port": 0, "metrics_port": None, "name": name, "state_dir": state}
    with Cluster.start([layer], **(options | settings)) as cluster, Client(cluster.endpoint) as client:
        running: Any = type("Running", (), {"cluster": cluster, "state_dir": state})
        with attached_to(running) as (attached, _):
            yield Trained(cluster, client, attached, name, state)


def rows(seed: int, count: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [count, WIDTH]."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(session: TrainingSession) -> dict[str, Tensor]:
    """All tensors of a session's candidates, by the id of the expert and their name."""
    named = {id: tensors_from_bytes(content)[0] for id, content in session.weights().items()}
    return {f"{id}.{name}": tensor for id, own in named.items() for name, tensor in own.items()}
