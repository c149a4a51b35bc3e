"""A cluster of chaos experts in a folder of its own, and what the experiments ask of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from benchmarks.home import own_home

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, errors, gates
from expertmesh.cluster.runtime.ray_environment import load_backend
from expertmesh.experts.construct.factory import locate
from expertmesh.experts.weights.files import load_tensors, save_tensors

from .checker import Checker, Ledger
from .exact import WIDTH, Maker, Shape
from .figures import say
from .load import Load, capacity

START_SECONDS = 600.0
CALL_SECONDS = 10.0
Told = TypeVar("Told")


@dataclass
class Mesh:
    """A running cluster with the layer that the checker knows, and the ledger of what was acknowledged."""

    shape: Shape
    folder: Path
    ballast: int
    settings: Mapping[str, Any]
    layers: tuple[Layer, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    cluster: Cluster = field(init=False)
    client: Client = field(init=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._maker = Maker(self.shape)

    def make(self, id: str) -> tuple[Path, dict[str, Any]]:
        """A safetensors file with the tensors of a new version of an id, and the tensors."""
        tensors = self._maker.tensors(id)
        path = self.folder / f"{id.replace('/', '-')}-{next(self._numbers)}.safetensors"
        saved = {name: torch.from_numpy(value) for name, value in tensors.items()}
        if self.ballast and id != self.shape.gate_id:
            generator = torch.Generator().manual_seed(next(self._numbers))
            saved["ballast"] = torch.randn(self.ballast // 4, generator=generator)
        save_tensors(path, saved)
        return path, tensors

    def start(self) -> None:
        """Start the cluster, from what is on disk if there is anything."""
        self.cluster = Cluster.start(self.layers, **self.settings)
        self.client = Client(self.cluster.endpoint, timeout=CALL_SECONDS)

    def stop(self) -> None:
        """Stop everything."""
        self.client.close()
        self.cluster.stop()

    def load(self, *, rate: float, count: int = 4) -> Load:
        """So many requests a second of `count` rows each, once it is entered."""
        return Load(self.cluster.endpoint, self.shape.layer, rate=rate, count=count)

    def rate(self, share: float, *, count: int = 4, seconds: float) -> float:
        """A share of the requests a second that 32 callers get answered."""
        full = capacity(Load(self.cluster.endpoint, self.shape.layer, callers=32, count=count), seconds=seconds)
        say("capacity, rows/s (32 callers)", full)
        say("open-loop load, requests/s", share * full / count)
        return share * full / count

    def checker(self) -> Checker:
        """A checker of the answers by what was acknowledged until now."""
        return Checker(self.shape, self.ledger)

    def state(self) -> dict[str, Any]:
        """What the controller tells, with its versions and epoch; waits for one that is restarting."""

        def told() -> dict[str, Any] | None:
            state = self.cluster.status()
            return state if state["epoch"] else None

        return wait_until(told, 30.0, "the controller answers")

    def pids(self) -> dict[str, list[int]]:
        """The processes of the replicas that are ready, by expert, as the router has heard of them."""
        experts = self.client.status()["layers"][self.shape.layer]["experts"]
        return {
            id: [replica["pid"] for replica in known["replicas"] if replica["state"] == "ready"]
            for id, known in experts.items()
        }

    def carried(self) -> str:
        """How many rows went which way, by the router's own count."""
        ways = self.client.status()["router"]["rows_carried"]
        return ", ".join(f"{rows} by {way}" for way, rows in ways.items())


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
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Mesh]:
    """A cluster on Ray with a layer of chaos experts, and `more` layers; nothing of it is left at the end.

    Each expert carries `ballast` bytes of weights that it does not use. `actors` are classes that take the place of the
    product's: {"ControllerActor": "module:attribute"}; `settings` go before the usual ones. One a process.
    """
    shape = Shape(experts)
    with own_home() as folder:
        backend = load_backend(None)
        for actor, where in (actors or {}).items():
            setattr(backend, actor, locate(where))
        usual = {
            "name": name,
            "port": 0,
            "metrics_port": None,
            "start_timeout": START_SECONDS,
            "state_dir": folder / "state" / name,
            "log_level": "warning",
            "transport": transport,
        }
        started = time.monotonic()
        mesh = Mesh(shape, folder, ballast, {**usual, **(settings or {})})
        made = {id: mesh.make(id) for id in shape.ids}
        layer = _layer(shape, {id: path for id, (path, _) in made.items()}, replicas, pause, ballast)
        mesh.layers = (layer, *more)
        mesh.start()
        try:
            state = mesh.state()
            mesh.ledger.begin(state["epoch"], state["versions"], {id: tensors for id, (_, tensors) in made.items()})
            print(f"{experts} experts x {replicas} replicas run after {time.monotonic() - started:.0f} s", flush=True)
            yield mesh
        finally:
            mesh.stop()


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


def wait_until(done: Callable[[], Told | None], seconds: float, what: str, pause: float = 0.02) -> Told:
    """Wait for something that other processes do, and return it; an error of the cluster means that it is not yet.

    Raises TimeoutError.
    """
    deadline, problem = time.monotonic() + seconds, ""
    while True:
        try:
            if found := done():
                return found
        except errors.ExpertMeshError as error:
            problem = f" ({error})"
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}{problem}")
        time.sleep(pause)


def processes(word: str) -> list[psutil.Process]:
    """The processes below this one whose command line holds a word, as Ray names them by their actor."""
    return [process for process, words in command_lines().items() if word in words]


def command_lines() -> dict[psutil.Process, str]:
    """The command line of each process below this one that lives."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # zombies, too
            found[process] = " ".join(process.cmdline())
    return found
