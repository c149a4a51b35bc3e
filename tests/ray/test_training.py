"""Training on a real Ray: the losses of the same layer in this process, by both doors, and kills of every process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import Client, Cluster, Expert, FailedPrecondition, Layer, RemoteMoE, TensorSpec, gates
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.experts.construct.factory import build
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import tensors_from_bytes
from expertmesh.router.mixture.local import LocalLayer

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::UserWarning")]
NAME, WIDTH, HIDDEN, STEPS = "test-training", 8, 16, 200
OPTIONS: dict[str, Any] = {"optimizer": "torch.optim:AdamW", "lr": 1e-2, "clip_norm": 0.5, "seed": 1}


def declared() -> Layer:
    rows = TensorSpec((WIDTH,), "float32")
    factory, args = "expertmesh.experts.modules:FeedForward", (WIDTH, HIDDEN)
    experts = {f"e{n}": Expert(factory, args=args, num_cpus=0, input=rows, output=rows) for n in range(4)}
    return Layer("l", gate(), experts, input=rows)


def gate() -> gates.TopK:
    torch.manual_seed(5)
    made = gates.TopK(WIDTH, 4, k=2)
    nn.init.normal_(made.weight)
    return made


def rows(number: int) -> Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(number % 4))


@pytest.fixture(scope="module")
def cluster(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("training") / "state"
    with Cluster.start([declared()], name=NAME, port=0, start_timeout=240, state_dir=state) as started:
        yield started


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(name=NAME, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def wanted() -> list[float]:
    """The losses of the layer in this process."""
    layer = declared()
    modules = [build(expert, id=id).function.requires_grad_(True) for id, expert in layer.everyone_by_id.items()]
    assert all(isinstance(module, FeedForward) for module in modules)
    local = LocalLayer(gate(), modules)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (local.experts, local.gate)]
    losses = []
    for number in range(STEPS):
        x = rows(number)
        loss = F.mse_loss(local(x), x.sin())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(local.experts.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def descend(connection: Any, session: TrainingSession, steps: int, before: Any = lambda number: None) -> list[float]:
    """The losses of so many steps of gate and experts."""
    own = gate()
    moe = RemoteMoE(connection, "l", gate=own, session=session)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    losses = []
    for number in range(steps):
        before(number)
        x = rows(number)
        loss = F.mse_loss(moe(x), x.sin())
        optimizer.zero_grad()
        loss.backward()
        session.step()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def relative(found: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) / other for one, other in zip(found, wanted, strict=True))


def test_a_client_has_the_losses_of_the_layer_in_this_process(client: Client, wanted: list[float]) -> None:
    before = client.call("l", rows(0))
    with client.train("l", **OPTIONS) as session:
        assert relative(descend(client, session, STEPS), wanted) <= 1e-4
        with pytest.raises(FailedPrecondition, match="is being trained by process"):
            client.train("l", **OPTIONS)
        during = client.call("l", rows(0))
        assert (during.versions, during.epoch) == (before.versions, before.epoch)
        assert torch.equal(during.output, before.output)
    assert client.training_sessions() == []


ATTACHED = """
import json, sys
import expertmesh
sys.path.insert(0, sys.argv[2])
from test_training import OPTIONS, STEPS, descend
with expertmesh.attach(sys.argv[1]) as router, router.train("l", **OPTIONS) as session:
    print(json.dumps(descend(router, session, STEPS)))
"""


def test_an_attached_router_has_them_too(cluster: Cluster, wanted: list[float]) -> None:
    words = (sys.executable, "-c", ATTACHED, NAME, os.path.dirname(__file__))
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert relative(json.loads(done.stdout.splitlines()[-1]), wanted) <= 1e-4


def kill(word: str, which: int) -> None:
    """SIGKILL one of the processes of this cluster whose command line holds a word."""
    ours = psutil.Process().children(recursive=True)
    found = sorted((p for p in ours if p.is_running() and word in " ".join(p.cmdline())), key=lambda p: p.pid)
    if found:
        os.kill(found[which % len(found)].pid, signal.SIGKILL)


def weights_of(session: TrainingSession) -> dict[str, Tensor]:
    return {
        f"{id}.{name}": tensor
        for id, content in session.weights().items()
        for name, tensor in tensors_from_bytes(content)[0].items()
    }


def test_all_replicas_learn_together_and_may_be_killed(client: Client, wanted: list[float]) -> None:
    """The losses are those of this process, and the weights those of a run without kills, bit for bit."""
    client.scale({"l/e0": 2, "l/e2": 2})
    try:
        with client.train("l", replicas="all", durable_every=10, **OPTIONS) as session:
            losses = descend(client, session, 40)
            weights = weights_of(session)
        assert relative(losses, wanted[:40]) <= 1e-4
        doomed, draw = {5: "ExpertActor", 14: "ExpertActor", 23: "RouterActor", 32: "ExpertActor"}, random.Random(2)

        def before(number: int) -> None:
            if number in doomed:
                kill(doomed[number], draw.randrange(6))

        with client.train("l", replicas="all", durable_every=10, patience=120.0, **OPTIONS) as session:
            assert descend(client, session, 40, before) == losses
            found = weights_of(session)
            assert all(torch.equal(found[name], weights[name]) for name in weights)
    finally:
        client.scale({"l/e0": 1, "l/e2": 1})


def test_killed_processes_lose_no_update_and_repeat_none(client: Client) -> None:
    """The weights are those of a run without faults, bit for bit."""
    with client.train("l", durable_every=10, **OPTIONS) as session:
        losses = descend(client, session, 40)
        wanted = weights_of(session)
    doomed = {6: "ExpertActor", 13: "RouterActor", 20: "ExpertActor", 27: "ControllerActor", 34: "ExpertActor"}
    draw = random.Random(1)

    def before(number: int) -> None:
        if number in doomed:
            kill(doomed[number], draw.randrange(4))

    with client.train("l", durable_every=10, patience=120.0, **OPTIONS) as session:
        assert descend(client, session, 40, before) == losses
        found = weights_of(session)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert sum(int(entry["lost_steps"]) for entry in session.restored) > 0
        outcome = session.publish()
        after = client.call("l", rows(0))
        assert after.epoch == outcome.epoch
        assert {id: after.versions[id] for id in session.versions} == session.versions
