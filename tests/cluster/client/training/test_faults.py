"""Whatever is lost, doubled, late or begun anew, a session ends with the weights of one without faults, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import WIDTH, Trained, layer_of, rows, trained_cluster, weights_of
from torch import Tensor
from torch.nn import functional as F

from expertmesh import RemoteMoE, Unavailable, gates
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.experts.errors import ExpertMeshError
from expertmesh.router.fanout.replica_view import Replica, View

STEPS, PASSES = 8, 2
OPTIONS: dict[str, Any] = {"optimizer": "torch.optim:AdamW", "lr": 0.02, "clip_norm": 0.3, "seed": 2}
all_ready = View.ready


@pytest.fixture(scope="module", params=["first", "all"])
def replicas(request: pytest.FixtureRequest) -> str:
    """Which replicas compute: all, of which there are two then."""
    which: str = request.param
    return which


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, replicas: str) -> Iterator[Trained]:
    folder: Path = tmp_path_factory.mktemp("faults")
    layer = layer_of(folder, gates.TopK(WIDTH, 3, k=2), replicas=2 if replicas == "all" else 1)
    with trained_cluster(folder, layer) as started:
        yield started


class Faulty:
    """A client whose messages are lost on their way there or back, or come twice, and whose experts are lost."""

    def __init__(self, running: Trained, seed: int) -> None:
        self.draw = random.Random(seed)
        self.faults = 0
        self.away: dict[str, int] = {}
        self._running = running

    def __getattr__(self, name: str) -> Any:
        return getattr(self._running.client, name)

    def _training(self, method: str, meta: dict[str, Any], tensors: Any, timeout: float | None = None) -> Any:
        kind = self.draw.choices(("none", "there", "back", "twice", "lost"), (80, 5, 5, 6, 4))[0]
        if meta["op"] in ("open", "resume", "close", "versions"):
            kind = "none"
        self.faults += kind != "none"
        if kind == "there":
            raise Unavailable("the message was lost; retry")
        if kind == "twice":
            self._running.client._training(method, meta, tensors, timeout)
        answer = self._running.client._training(method, meta, tensors, timeout)
        if kind == "back":
            raise Unavailable("the answer was lost; retry")
        if kind == "lost":
            self.lose()
        return answer

    def lose(self) -> None:
        """End what one replica has, as with its process; where there is another, it may take over for a while."""
        backend: Any = self._running.cluster._backend
        name = self.draw.choice(sorted(backend._hosts))
        training = backend._hosts[name]._training
        training._candidates.clear()
        training._copies.clear()
        self.away[name] = self.draw.randrange(6)

    def ready(self, view: View, expert: str) -> list[Replica]:
        """The replicas of an expert, without those that are away for some messages, if there are others."""
        found = all_ready(view, expert)
        here = [replica for replica in found if not self.away.get(replica.id)]
        self.away = {name: count - 1 for name, count in self.away.items() if count}
        return here or found


class Interrupted(BaseException):
    """As Ctrl-C, somewhere in a step."""


def gate() -> gates.TopK:
    torch.manual_seed(4)
    made = gates.TopK(WIDTH, 3, k=2)
    torch.nn.init.normal_(made.weight)
    return made


def one_step(session: TrainingSession, moe: RemoteMoE, number: int, draw: random.Random | None) -> None:
    """A step of some passes; with `draw` it is begun and interrupted now and then, and made again."""
    while True:
        try:
            for part in range(PASSES):
                x = rows(10 * number + part, 7)
                loss = F.mse_loss(moe(x), x.sin())
                if draw is not None and draw.random() < 0.1:
                    raise Interrupted
                loss.backward()
                if draw is not None and draw.random() < 0.1:
                    raise Interrupted
            break
        except Interrupted:
            session.zero_grad()
            session._drawn = (session.step_count, 0)  # the same numbers again, as in a run without faults
    session.step()


@pytest.fixture(scope="module")
def wanted(running: Trained, replicas: str) -> dict[str, Tensor]:
    with running.client.train("l", replicas=replicas, **OPTIONS) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        for number in range(STEPS):
            one_step(session, moe, number, None)
        return weights_of(session)


@pytest.mark.parametrize("seed", range(6))
def test_the_weights_are_those_of_a_run_without_faults(
    running: Trained, wanted: dict[str, Tensor], replicas: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty(running, seed)
    monkeypatch.setattr(View, "ready", lambda view, expert: faulty.ready(view, expert))
    every = faulty.draw.choice([None, 1, 3])
    train: Any = type(running.client).train
    session: TrainingSession = train(faulty, "l", replicas=replicas, durable_every=every, **OPTIONS)
    try:
        moe = RemoteMoE(faulty, "l", gate=gate(), session=session)  # type: ignore[arg-type]
        while session.step_count < STEPS:
            one_step(session, moe, session.step_count, faulty.draw)
            if faulty.draw.random() < 0.15:
                session.save()
            if faulty.draw.random() < 0.15:  # by another process, which goes on at what is durable
                before, session = session, train(faulty, "l", resume=session.id, durable_every=every, **OPTIONS)
                assert session.step_count == before.durable
                moe = RemoteMoE(faulty, "l", gate=gate(), session=session)  # type: ignore[arg-type]
        found = weights_of(session)
        assert faulty.faults > 0
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        with pytest.raises(ExpertMeshError):
            session.backward([("l/e0", "", 0, 1, 0)], {}, 0, 1)
    finally:
        session.abort()
