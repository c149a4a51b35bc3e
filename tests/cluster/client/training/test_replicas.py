"""Training by all replicas of each expert: the gradients are those of one, and no state of another branch is used."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import OUT, WIDTH, Trained, layer_of, rows, trained_cluster, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import (
    Client,
    DeadlineExceeded,
    Expert,
    FailedPrecondition,
    InvalidRequest,
    Layer,
    RemoteMoE,
    TensorSpec,
    gates,
)
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.cluster.gateway import training_passes
from expertmesh.experts.training import slices
from expertmesh.experts.training.desk import TrainingDesk
from expertmesh.router.fanout.replica_view import Replica, View

ADAM: dict[str, Any] = {"optimizer": "torch.optim:AdamW", "lr": 0.02, "clip_norm": 0.3, "seed": 2}
all_ready = View.ready


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder: Path = tmp_path_factory.mktemp("replicas")
    layer = layer_of(folder, gates.TopK(WIDTH, 2, k=2), replicas=2)
    with trained_cluster(folder, layer) as started:
        yield started


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The fields of every message of training that a replica gets."""
    seen: list[Mapping[str, Any]] = []
    answer = TrainingDesk.answer

    def noted(desk: TrainingDesk, call: Any) -> Any:
        seen.append(dict(call.meta))
        return answer(desk, call)

    monkeypatch.setattr(TrainingDesk, "answer", noted)
    return seen


def gate() -> gates.TopK:
    torch.manual_seed(4)
    made = gates.TopK(WIDTH, 2, k=2)
    nn.init.normal_(made.weight)
    return made


def descend(session: TrainingSession, client: Any, seeds: range) -> list[float]:
    moe = RemoteMoE(client, "l", gate=gate(), session=session)
    losses = []
    for seed in seeds:
        x = rows(seed, 9)
        loss = F.mse_loss(moe(x), x.sin())
        loss.backward()
        session.step()
        losses.append(float(loss.detach()))
    return losses


def test_all_replicas_learn_what_one_learns(running: Trained, asked: list[Mapping[str, Any]]) -> None:
    with running.client.train("l", **ADAM) as session:
        wanted, weights = descend(session, running.client, range(20)), weights_of(session)
    asked.clear()
    with running.client.train("l", replicas="all", **ADAM) as session:
        found = descend(session, running.client, range(20))
        assert found == pytest.approx(wanted, rel=1e-4)
        for name, tensor in weights_of(session).items():
            assert torch.allclose(tensor, weights[name], atol=1e-4)
    assert sum(meta["op"] == "backward" and meta.get("copied", False) for meta in asked) == 2 * 20  # by expert and step
    assert sum(meta["op"] == "copy" for meta in asked) == 2 * 20


def test_a_candidate_of_another_branch_is_never_used(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    away: list[str] = []

    def ready(view: View, expert: str) -> list[Replica]:
        return [replica for replica in all_ready(view, expert) if replica.id not in away]

    experts = running.client.status()["layers"]["l"]["experts"].values()
    firsts = [min(replica["id"] for replica in expert["replicas"]) for expert in experts]
    monkeypatch.setattr(View, "ready", ready)
    for which in ("first", "all"):
        session = running.client.train("l", replicas=which, durable_every=None, **ADAM)
        away[:] = firsts
        descend(session, running.client, range(3))  # the second replicas have candidates of three steps
        away.clear()
        session = running.client.train("l", resume=session.id, durable_every=None, seed=2, lr=0.02, clip_norm=0.3)
        assert session.step_count == 0
        descend(session, running.client, range(10, 13))
        away[:] = firsts
        found = weights_of(session)
        away.clear()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights_of(session).items())
        session.abort()


def test_who_computes_makes_no_difference_to_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the gradients of rows either, where the slices of a row's experts are at different replicas."""
    away: list[str] = []

    def ready(view: View, expert: str) -> list[Replica]:
        return [replica for replica in all_ready(view, expert) if replica.id not in away]

    monkeypatch.setattr(View, "ready", ready)
    chosen = gates.TopK(WIDTH, 4, k=3)
    torch.manual_seed(4)
    nn.init.normal_(chosen.weight)
    found = []
    with trained_cluster(tmp_path, layer_of(tmp_path, gates.TopK(WIDTH, 4, k=3), replicas=2, pack="p")) as running:
        for gone in ([], ["l/p#0"], ["l/p#1"]):
            with running.client.train("l", replicas="all", **ADAM) as session:
                away[:] = gone
                x = rows(1, 64).requires_grad_(True)
                RemoteMoE(running.client, "l", gate=chosen, session=session)(x).square().sum().backward()
                assert x.grad is not None
                session.step()
                found.append({"rows": x.grad, **weights_of(session)})
                away.clear()
    assert all(torch.equal(other[name], tensor) for other in found[1:] for name, tensor in found[0].items())


def test_what_is_lost_between_two_answers_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, lost = TrainingDesk.answer, [(), (1,), (0,)]  # the candidates that have gone by each answer of a pack

    def losing(desk: TrainingDesk, call: Any) -> Any:
        if call.meta["op"] == "forward" and lost:
            for at in lost.pop():
                desk._candidates.pop(call.meta["parts"][at][0])
        return answer(desk, call)

    layer = layer_of(tmp_path, gates.TopK(WIDTH, 2, k=2), pack="p")
    with trained_cluster(tmp_path, layer) as running, running.client.train("l", **ADAM) as session:
        monkeypatch.setattr(TrainingDesk, "answer", losing)
        descend(session, running.client, range(1))
        assert (session.step_count, lost) == (1, [])


def test_a_replica_that_becomes_the_first_keeps_no_copy(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = running.cluster._backend
    with running.client.train("l", replicas="all", **ADAM) as session:
        descend(session, running.client, range(1))
        monkeypatch.setattr(View, "ready", lambda view, expert: all_ready(view, expert)[1:])
        descend(session, running.client, range(1))
        desks = [host._training for host in backend._hosts.values()]
        assert sum(len(desk._candidates) for desk in desks) == 4
        assert not any(desk._copies for desk in desks)
        monkeypatch.undo()


def test_gradients_are_not_added_up_on_the_event_loop(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which serves meanwhile: they are as large as the experts."""
    on_loop: list[bool] = []

    def noted(function: Any, *arguments: Any) -> Any:
        on_loop.append(asyncio._get_running_loop() is not None)
        return function(*arguments)

    for module, name in ((slices, "added"), (training_passes, "gradients_of_slices")):
        monkeypatch.setattr(module, name, partial(noted, getattr(module, name)))
    with running.client.train("l", replicas="all", **ADAM) as session:
        descend(session, running.client, range(1))
    assert on_loop == [False] * 3  # of a pass, and of its two experts


class Averaging(nn.Module):
    """Keeps a running average of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, OUT)
        self.norm = nn.BatchNorm1d(OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y


def averaging() -> nn.Module:
    """The factory of an expert with buffers that change."""
    torch.manual_seed(0)
    return Averaging()


def test_buffers_that_change_have_no_sum(tmp_path: Path) -> None:
    own = TensorSpec((WIDTH,), "float32")
    expert = Expert(f"{__name__}:averaging", replicas=2, input=own)
    with trained_cluster(tmp_path, Layer("l", gates.Fixed([1.0]), {"e0": expert}, input=own)) as running:
        with running.client.train("l", replicas="all", **ADAM) as session:
            moe = RemoteMoE(running.client, "l", gate=gates.Fixed([1.0]), session=session)
            with pytest.raises(FailedPrecondition, match=r'averages of its rows .* replicas="first"'):
                moe(rows(1)).sum().backward()
        with running.client.train("l", **ADAM) as session:
            moe = RemoteMoE(running.client, "l", gate=gates.Fixed([1.0]), session=session)
            moe(rows(1)).sum().backward()
            assert session.step().updated == ("l/e0",)


def test_a_slice_that_fails_fails_its_expert_alone(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = TrainingDesk._guarded

    def failing(desk: TrainingDesk, part: Any, work: Any) -> Any:
        if part[0] == "l/e0" and part[4] == 1 and part[2] < part[3]:
            return {"error": "Unavailable", "message": "l/e0: it does not answer"}
        return answer(desk, part, work)

    monkeypatch.setattr(TrainingDesk, "_guarded", failing)
    options = {**ADAM, "on_missing": "leave_out", "patience": 0.0}
    with running.client.train("l", replicas="all", **options) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        x = rows(3, 9).requires_grad_(True)
        moe(x).sum().backward()
        assert set(moe.left_out) == {"l/e0"}
        assert x.grad is not None
        assert session.step().updated == ("l/e1",)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "all"])
def test_an_expert_that_hangs_is_left_out_within_the_time_of_its_caller(
    running: Trained, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    answer, goes_on = TrainingDesk._guarded, threading.Event()

    def hanging(desk: TrainingDesk, part: Any, work: Any) -> Any:
        if part[0] == "l/e0" and part[2] < part[3]:
            goes_on.wait(60)
        return answer(desk, part, work)

    options = {**ADAM, "on_missing": "leave_out", "patience": 0.0}
    with (
        Client(running.cluster.endpoint, timeout=10.0) as client,
        client.train("l", replicas=which, **options) as session,
    ):
        moe = RemoteMoE(client, "l", gate=gate(), session=session)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingDesk, "_guarded", hanging)
            try:
                moe(rows(3, 9)).sum().backward()
            finally:
                goes_on.set()
        assert isinstance(moe.left_out["l/e0"], DeadlineExceeded)
        assert session.step().updated == ("l/e1",)


def test_who_computes_must_be_said_as_it_is(running: Trained) -> None:
    with pytest.raises(InvalidRequest, match="replicas must be one of first, all, not 'two'"):
        running.client.train("l", replicas="two", **ADAM)
    assert running.client.training_sessions() == []
