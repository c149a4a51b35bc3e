"""How weights go to replicas: what is staged together must not be mixed up on its way."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.cluster.control.messages import Desired
from expertmesh.cluster.runtime.ray_environment import load_backend
from expertmesh.experts.spec import Expert
from expertmesh.experts.tensors import from_bytes
from expertmesh.experts.weights.files import save_tensors
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

pytestmark = pytest.mark.ray


def test_candidates_that_are_staged_together_get_their_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backend(None)  # as a private Ray would have it: with its token, before Ray is imported
    from expertmesh.cluster.runtime import ray_ports

    puts: list[float] = []

    class Reference:
        """Lets other threads in when it is dropped, as Ray's references do."""

        def __init__(self, value: float) -> None:
            self.value = value

        def __del__(self) -> None:
            threading.Event().wait(0.002)

    def put(packed: dict[str, Any]) -> Reference:
        puts.append(float(from_bytes(*packed["weight"])[0]))
        return Reference(puts[-1])

    monkeypatch.setattr(ray_ports.ray, "put", put)
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for number, path in enumerate(paths):
        save_tensors(path, {"weight": torch.tensor([float(number)])})
    port = ray_ports.RayReplicaPort()
    wanted = [number % 12 for number in range(240)]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda number: port._stored(paths[number]).value, wanted)
        assert list(found) == [float(number) for number in wanted]
    packed = ray_ports.pack(torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn))  # a dtype that rows cannot have
    assert from_bytes(*packed).float().tolist() == [1.0, -2.0]
    puts.clear()
    assert [port._stored(paths[0]).value for _ in range(3)] == [0.0] * 3
    assert len(puts) <= 1  # once for all replicas


def test_a_live_object_that_cannot_be_sent_is_named_and_how_to_declare_it() -> None:
    load_backend(None)
    from expertmesh.cluster.runtime.ray_backend import _unsendable

    experts = {"a": Expert("torch:sin"), "b": Expert.from_function(lambda rows: (rows, threading.Lock())[0])}
    layer = Layer("l", gates.Fixed([1.0, 1.0]), experts)
    assert _unsendable(Desired(layers={"l": layer})) is None
    held = threading.Lock()
    layer = layer.with_experts({**experts, "b": Expert.from_function(lambda rows: held and rows)})
    error = _unsendable(Desired(layers={"l": layer}))
    assert error is not None
    assert re.match(
        r"l/b: the live function cannot be sent to its replica: .*lock.*Declare it by a factory", error.message
    )
