"""Training beside requests: none fails, and no answer changes, until `publish` changes all versions in one epoch."""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import numpy as np
import torch
from benchmarks.chaos.figures import quantile, say
from torch.nn import functional as F

from expertmesh import Client, RemoteMoE
from expertmesh.experts.errors import ExpertMeshError

from .cluster import LAYER, gate, rows, training_cluster

RATE = 50.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the experiment."""
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half: steady, and while training")
    parser.add_argument("--replicas", type=int, default=2)


class Requests:
    """A caller at a steady rate: what it was answered, and when."""

    def __init__(self, client: Client) -> None:
        self.answers: list[tuple[float, float, int, tuple[tuple[str, str], ...], bytes]] = []
        self.failed: list[str] = []
        self._client = client
        self._x = rows(9999, 4).numpy()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due += 1.0 / RATE
            sent = time.monotonic()
            try:
                reply = self._client.call(LAYER, self._x, timeout=10.0)
            except ExpertMeshError as error:
                self.failed.append(f"{type(error).__name__}: {error.message[:120]}")
                continue
            output = np.asarray(reply.output).tobytes()
            self.answers.append((sent, time.monotonic(), reply.epoch, tuple(sorted(reply.versions.items())), output))

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()


def run(options: argparse.Namespace) -> list[str]:
    """Run the experiment; returns what was not as it must be."""
    problems: list[str] = []
    with training_cluster("bench-training-serving", replicas=options.replicas) as (cluster, client):
        with Client(cluster.endpoint) as other, Requests(other) as requests:
            time.sleep(options.seconds)
            began = time.monotonic()
            session = client.train(LAYER, optimizer="torch.optim:AdamW", lr=1e-3)
            own = gate(4)
            moe, steps = RemoteMoE(client, LAYER, gate=own, session=session), 0
            while time.monotonic() - began < options.seconds:
                x = rows(steps, 256)
                torch.autograd.backward(F.mse_loss(moe(x), x.sin()))
                session.step()
                steps += 1
            published = time.monotonic()
            outcome: Any = session.publish(gate=own)
            acknowledged = time.monotonic()
            time.sleep(2.0)
            session.abort()
            with torch.no_grad():
                after = moe_answers(client)
        before = [answer for answer in requests.answers if answer[0] < published and answer[2] < outcome.epoch]
        later = [answer for answer in requests.answers if answer[0] > acknowledged]
        say("steps of 256 rows while requests were answered", steps)
        say("requests answered, failed", f"{len(requests.answers)}, {len(requests.failed)}")
        kinds = {(epoch, versions) for _, _, epoch, versions, _ in before}
        say("epochs and versions before publish", len(kinds))
        say("different outputs before publish", len({output for *_, output in before}))
        epochs = sorted({epoch for _, _, epoch, _, _ in later})
        say("epochs after publish was acknowledged", epochs)
        for name, kept in (("steady", lambda a: a[1] < began), ("while training", lambda a: began < a[0] < published)):
            times = [1000 * (done - sent) for sent, done, *_ in filter(kept, before)]
            say(f"p50, p99 {name}, ms", f"{quantile(times, 0.5):.1f}, {quantile(times, 0.99):.1f}")
        if requests.failed:
            problems.append(f"{len(requests.failed)} requests failed: {requests.failed[0]}")
        if len(kinds) != 1 or len({output for *_, output in before}) != 1:
            problems.append("an answer changed before publish")
        if epochs != [outcome.epoch] or len({output for *_, output in later}) != 1:
            problems.append(f"after publish there are the epochs {epochs}, not {outcome.epoch} alone")
        if later and not np.allclose(np.frombuffer(later[-1][-1], np.float32), after.ravel(), atol=1e-5):
            problems.append("what is answered after publish is not what was published")
    return problems


def moe_answers(client: Client) -> Any:
    """The answers to the caller's rows."""
    return np.asarray(client.forward(LAYER, rows(9999, 4).numpy()))
