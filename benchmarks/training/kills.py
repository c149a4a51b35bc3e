"""Updates happen once: repeated messages, and kills of experts, router and controller, beside a run without faults."""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.chaos.figures import say
from torch import Tensor
from torch.nn import functional as F

from expertmesh import Client, RemoteMoE
from expertmesh.cluster.client.training.session import TrainingSession

from .cluster import LAYER, gate, kill, rows, training_cluster, weights_of

EXPERTS = 4
ACTORS = ("ExpertActor", "RouterActor", "ControllerActor")


class Repeating:
    """A client that sends some of its messages two or three times."""

    def __init__(self, client: Client, share: float, seed: int) -> None:
        self.repeated = self.sent = 0
        self._client = client
        self._share = share
        self._draw = random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _training(self, method: str, meta: dict[str, Any], tensors: Any, timeout: float | None = None) -> Any:
        self.sent += 1
        if meta["op"] == "update" and self._draw.random() < self._share:
            self.repeated += 1
            for _ in range(self._draw.choice((1, 2))):
                self._client._training(method, meta, tensors, timeout)
        return self._client._training(method, meta, tensors, timeout)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the experiment."""
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--experts-killed", type=int, default=10)
    parser.add_argument("--routers-killed", type=int, default=2)
    parser.add_argument("--controllers-killed", type=int, default=2)
    parser.add_argument("--durable-every", type=int, default=25)


def train(
    connection: Any, updates: int, durable_every: int, before: Callable[[int], None] = lambda number: None
) -> tuple[dict[str, Tensor], TrainingSession, list[float]]:
    """Some updates, each after `before` was called with its number; the weights, the session and the losses."""
    options: dict[str, Any] = {"optimizer": "torch.optim:AdamW", "lr": 1e-3, "clip_norm": 1.0, "seed": 1}
    session = Client.train(connection, LAYER, durable_every=durable_every, patience=120.0, **options)
    moe, losses = RemoteMoE(connection, LAYER, gate=gate(EXPERTS), session=session), []
    for number in range(updates):
        before(number)
        x = rows(number)
        loss = F.mse_loss(moe(x), x.sin())
        torch.autograd.backward(loss)
        session.step()
        losses.append(float(loss.detach()))
    return weights_of(session), session, losses


def run(options: argparse.Namespace) -> list[str]:
    """Run the experiment; returns what was not as it must be."""
    counts = (options.experts_killed, options.routers_killed, options.controllers_killed)
    draw, problems = random.Random(7), []
    steps = draw.sample(range(5, options.updates - 5), sum(counts))
    doomed = dict(zip(steps, [actor for actor, n in zip(ACTORS, counts, strict=True) for _ in range(n)], strict=True))
    with training_cluster("bench-training-kills") as (cluster, client):
        began = time.monotonic()
        wanted, plain, losses = train(client, options.updates, options.durable_every)
        plain.abort()
        say("without faults, s", time.monotonic() - began)
        killers: list[threading.Thread] = []

        def before(number: int) -> None:
            if number in doomed:
                killer = threading.Timer(draw.random() * 0.01, kill, (doomed[number], number))  # somewhere in the step
                killers.append(killer)
                killer.start()

        repeating = Repeating(Client(cluster.endpoint, timeout=60.0), 0.3, seed=3)
        began = time.monotonic()
        found, session, faulty = train(repeating, options.updates, options.durable_every, before)
        say("with faults, s", time.monotonic() - began)
        ledger = _ledger(client, session)
        say("updates in the ledgers of the experts", ledger)
        say("updates sent two or three times", repeating.repeated)
        say("experts, routers, controllers killed", ", ".join(map(str, counts)))
        lost = sum(int(entry["lost_steps"]) for entry in session.restored)
        say("steps lost with their processes, and repeated", f"{lost} in {len(session.restored)} restorations")
        if any(count != options.updates for count in ledger.values()):
            problems.append(f"the ledgers count {ledger}, and not {options.updates}")
        different = [name for name in wanted if not torch.equal(wanted[name], found[name])]
        say("tensors that differ from those without faults", f"{len(different)} of {len(wanted)}")
        if different or faulty != losses:
            problems.append(f"the weights differ from those without faults: {', '.join(different[:3])}")
        session.abort()
    return problems


def _ledger(client: Client, session: TrainingSession) -> dict[str, int]:
    """How many steps each expert says it has applied."""
    told = {}
    for id in session.experts:
        meta = {"op": "weights", "session": session.id, "step": session.step_count + 1, "parts": [[id, "", 0, 0, 0]]}
        told[id] = int(client._training("Train", meta, {}).meta["outcomes"][0]["applied"])
    return told
