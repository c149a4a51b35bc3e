"""Bad weights files against a cluster of real actors under load: refused, nobody harmed, and nothing kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.artefacts import bad_artefacts

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, errors, gates
from expertmesh.cluster.client.upload import LocalFile
from expertmesh.experts.weights.files import save_module

pytestmark = pytest.mark.ray
WIDTH = 512
MOST_GROWTH_MB = 20.0


@pytest.fixture(scope="module")
def cluster(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("weights")
    rows = TensorSpec((WIDTH,), "float32")
    experts = {}
    for number in range(2):
        torch.manual_seed(number)
        path = folder / f"e{number}.safetensors"
        save_module(path, torch.nn.Linear(WIDTH, WIDTH))
        experts[f"e{number}"] = Expert("torch.nn:Linear", args=(WIDTH, WIDTH), weights=path, replicas=2, input=rows)
    layer = Layer("bad", gates.Fixed([0.5, 0.5]), experts)
    with Cluster.start([layer], name="artefacts", port=0, transport=transport) as running:
        yield running


def private_megabytes() -> float:
    """What the actors of this process hold for themselves."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "Actor" in " ".join(process.cmdline()):
                total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def test_bad_artefacts_under_load(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
    failures: list[str] = []
    answered = [0]
    stop = threading.Event()
    with Client(cluster.endpoint) as client:
        before = client.call("bad", x)

        def call() -> None:
            while not stop.wait(0.005):
                try:
                    reply = client.call("bad", x)
                except errors.ExpertMeshError as error:
                    failures.append(repr(error))
                    continue
                answered[0] += 1
                if not np.array_equal(reply.output, before.output) or reply.versions != before.versions:
                    failures.append(f"another answer: {reply}")

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        files = bad_artefacts(tmp_path, torch.nn.Linear(WIDTH, WIDTH).state_dict())
        assert len(files) >= 14
        for round_number in range(3):  # the first rounds warm everything up, the last must not grow
            held = private_megabytes()
            for bad in files:
                monkeypatch.setattr(LocalFile, "sha256", lambda file, bad=bad: bytes.fromhex(bad.sha256))
                with pytest.raises(errors.ExpertMeshError) as caught:
                    client.swap({"bad/e0": bad.path}, max_drift=bad.max_drift)
                assert caught.value.code == bad.code, (bad.name, caught.value)
            grown = private_megabytes() - held
            print(f"round {round_number}: {len(files)} refused, actors grew by {grown:.1f} MB")
        stop.set()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert answered[0] > 50
        assert grown < MOST_GROWTH_MB
        assert client.call("bad", x).versions == before.versions
