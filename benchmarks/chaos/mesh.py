"""A cluster of chaos experts in a folder of its own, and what the experiments ask of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.home import own_home

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, errors, gates
from expertmesh.cluster.runtime.ray_environment import load_backend
from expertmesh.experts.construct.factory import locate
from expertmesh.experts.weights.files import load_tensors, save_tensors

from .checker import Ledger
from .exact import WIDTH, Maker, Shape
from .heavy import ballast as make_ballast

START_SECONDS = 600.0
CALL_SECONDS = 10.0


@dataclass
class Files:
    """Writes the tensors of new versions as safetensors files."""

    shape: Shape
    folder: Path
    ballast: int = 0
    maker: Maker = field(init=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.maker = Maker(self.shape)

    def make(self, id: str) -> tuple[Path, dict[str, Any]]:
        """A file with new tensors for an id, and the tensors."""
        tensors = self.maker.tensors(id)
        path = self.folder / f"{id.replace('/', '-')}-{next(self._numbers)}.safetensors"
        saved = {name: torch.from_numpy(value) for name, value in tensors.items()}
        if self.ballast and id != self.shape.gate_id:
            saved["ballast"] = make_ballast(self.ballast, next(self._numbers))
        save_tensors(path, saved)
        return path, tensors


@dataclass
class Mesh:
    """A running cluster with the layer that the checker knows, and the ledger of what was acknowledged."""

    shape: Shape
    files: Files
    layers: tuple[Layer, ...]
    settings: Mapping[str, Any]
    cluster: Cluster
    client: Client
    ledger: Ledger

    def restart(self) -> None:
        """Stop everything, and start it again from what is on disk."""
        self.client.close()
        self.cluster.stop()
        self.cluster = Cluster.start(self.layers, **self.settings)
        self.client = Client(self.cluster.endpoint, timeout=CALL_SECONDS)

    def versions(self) -> dict[str, str]:
        """The versions that the controller has; waits for one that is restarting."""
        return dict(self._state()["versions"])

    def epoch(self) -> int:
        """The epoch that the controller has; waits for one that is restarting."""
        return int(self._state()["epoch"])

    def pids(self, state: str = "ready") -> dict[str, list[int]]:
        """The processes of the replicas in a state, by expert, as the router has heard of them."""
        experts = self.client.status()["layers"][self.shape.layer]["experts"]
        return {
            id: [replica["pid"] for replica in known["replicas"] if replica["state"] == state]
            for id, known in experts.items()
        }

    def carried(self) -> str:
        """How many rows went which way, by the router's own count."""
        ways = self.client.status()["router"]["rows_carried"]
        return ", ".join(f"{rows} by {way}" for way, rows in ways.items())

    def _state(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def told() -> bool:
            try:
                found.append(self.cluster.status())
            except errors.Unavailable:
                return False
            return bool(found[-1]["epoch"])

        wait_until(told, 30.0, "the controller answers")
        return found[-1]


@contextmanager
def chaos_mesh(
    name: str,
    *,
    experts: int,
    replicas: int,
    pause: float = 0.0,
    ballast: int = 0,
    more: tuple[Layer, ...] = (),
    actors: Mapping[str, str] | None = None,
    transport: str = "channel",
) -> Iterator[Mesh]:
    """A cluster on Ray with a layer of chaos experts, and `more` layers; nothing of it is left at the end.

    Each expert carries `ballast` bytes of weights that it does not use. `actors` are classes that take the place of the
    product's: {"ControllerActor": "module:attribute"}. One a process.
    """
    shape = Shape(experts)
    with own_home() as folder:
        backend = load_backend(None)
        for actor, where in (actors or {}).items():
            setattr(backend, actor, locate(where))
        files = Files(shape, folder, ballast)
        made = {id: files.make(id) for id in shape.ids}
        layers = (_layer(shape, {id: path for id, (path, _) in made.items()}, replicas, pause, ballast), *more)
        settings = {
            "name": name,
            "port": 0,
            "metrics_port": None,
            "start_timeout": START_SECONDS,
            "state_dir": folder / "state" / name,
            "log_level": "warning",
            "transport": transport,
        }
        started = time.monotonic()
        mesh = Mesh(shape, files, layers, settings, Cluster.start(layers, **settings), None, Ledger())  # type: ignore[arg-type]
        try:
            mesh.client = Client(mesh.cluster.endpoint, timeout=CALL_SECONDS)
            mesh.ledger.begin(mesh.epoch(), mesh.versions(), {id: tensors for id, (_, tensors) in made.items()})
            print(f"{experts} experts x {replicas} replicas run after {time.monotonic() - started:.0f} s", flush=True)
            yield mesh
        finally:
            if mesh.client is not None:
                mesh.client.close()
            mesh.cluster.stop()


def _layer(shape: Shape, weights: Mapping[str, Path], replicas: int, pause: float, ballast: int) -> Layer:
    gate = gates.TopK(WIDTH, shape.experts, k=2)
    gate.load_state_dict(load_tensors(weights[shape.gate_id])[0])
    factory = "benchmarks.chaos.heavy:HeavyExpert" if ballast else "expertmesh.experts.chaos:ChaosExpert"
    heavy = {"ballast": ballast} if ballast else {}
    experts = {
        id.partition("/")[2]: Expert(
            factory,
            kwargs={"width": WIDTH, "experts": shape.experts, "place": place, "pause": pause, **heavy},
            weights=weights[id],
            num_cpus=0,
            replicas=replicas,
            input=TensorSpec((WIDTH,), "float32"),
            output=TensorSpec((WIDTH + shape.experts,), "float32"),
        )
        for place, id in enumerate(shape.expert_ids)
    }
    return Layer(shape.layer, gate, experts, input=TensorSpec((WIDTH,), "float32"))


def wait_until(done: Callable[[], object], seconds: float, what: str, pause: float = 0.02) -> float:
    """Wait for something that other processes do; returns how long it took. Raises TimeoutError."""
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
    return time.monotonic() - started


def processes(word: str) -> list[psutil.Process]:
    """The processes below this one whose command line holds a word, as Ray names them by their actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
