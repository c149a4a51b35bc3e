"""A cluster on Ray of feed-forward experts, whose rows, targets and gate follow from numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from benchmarks.chaos.mesh import processes
from benchmarks.home import own_home
from torch import Tensor, nn

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, gates
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import save_module, tensors_from_bytes

LAYER, WIDTH, HIDDEN = "l", 16, 32


def gate(experts: int) -> gates.TopK:
    """The gate of that many experts."""
    torch.manual_seed(100)
    made = gates.TopK(WIDTH, experts, k=2)
    nn.init.normal_(made.weight)
    return made


def rows(number: int, count: int = 16) -> Tensor:
    """The rows of a step, [count, WIDTH]."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(number))


@contextmanager
def training_cluster(
    name: str, *, experts: int = 4, replicas: int = 1, factory: str = "", **settings: Any
) -> Iterator[tuple[Cluster, Client]]:
    """A running cluster, and a client; nothing of it is left at the end."""
    with own_home() as folder:
        made = {}
        for number in range(experts):
            torch.manual_seed(number)
            path = folder / f"e{number}.safetensors"
            save_module(path, FeedForward(WIDTH, HIDDEN, out_features=WIDTH))
            spec = TensorSpec((WIDTH,), "float32")
            made[f"e{number}"] = Expert(
                factory or "expertmesh.experts.modules:FeedForward",
                args=(WIDTH, HIDDEN),
                kwargs={"out_features": WIDTH},
                weights=path,
                num_cpus=0,
                replicas=replicas,
                input=spec,
                output=spec,
            )
        layer = Layer(LAYER, gate(experts), made, input=TensorSpec((WIDTH,), "float32"))
        usual = {"name": name, "port": 0, "metrics_port": None, "start_timeout": 600.0, "log_level": "warning"}
        options = {**usual, "state_dir": folder / "state", **settings}
        with Cluster.start([layer], **options) as cluster, Client(cluster.endpoint) as client:
            yield cluster, client


def kill(word: str, which: int = 0) -> None:
    """SIGKILL one of the processes whose command line holds a word, as Ray names them by their actor."""
    found = sorted(processes(word), key=lambda process: process.pid)
    if found:
        try:
            os.kill(found[which % len(found)].pid, signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            time.sleep(0)


def weights_of(session: TrainingSession) -> dict[str, Tensor]:
    """The tensors of all candidates by expert and name."""
    return {
        f"{id}.{name}": tensor
        for id, content in session.weights().items()
        for name, tensor in tensors_from_bytes(content)[0].items()
    }
