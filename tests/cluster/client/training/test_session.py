"""A session of training: its updates happen once, whatever is lost; what serves changes at `publish` alone."""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import WIDTH, Trained, layer_of, rows, trained_cluster, weights_of
from helpers.waiting import eventually
from torch import Tensor
from torch.nn import functional as F

from expertmesh import Client, Expert, FailedPrecondition, Layer, RemoteMoE, TensorSpec, Unavailable, gates
from expertmesh.cluster.client.training.session import TrainingSession
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import (
    Aborted,
    ConfigError,
    ExpertFailed,
    Fenced,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SpecMismatch,
    VersionGone,
)
from expertmesh.experts.tensors import to_wire
from expertmesh.experts.training.desk import TrainingDesk
from expertmesh.experts.weights.files import tensors_from_bytes, tensors_to_bytes

X = rows(0, 16)
SGD: dict[str, Any] = {"optimizer": "torch.optim:SGD", "lr": 0.05, "momentum": 0.9, "seed": 3}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Trained]:
    with trained_cluster(tmp_path, layer_of(tmp_path, gates.TopK(WIDTH, 3, k=2))) as started:
        yield started


def gate() -> gates.TopK:
    torch.manual_seed(11)
    made = gates.TopK(WIDTH, 3, k=2)
    torch.nn.init.normal_(made.weight)
    return made


def descend(session: TrainingSession, door: Any, steps: int, first: int = 0) -> list[float]:
    """The losses of some steps, whose rows follow from their numbers."""
    moe, losses = RemoteMoE(door, "l", gate=gate(), session=session), []
    for number in range(first, first + steps):
        x = rows(number, 8)
        loss = F.mse_loss(moe(x), x.sin())
        loss.backward()
        session.step()
        losses.append(float(loss.detach()))
    return losses


def lose_candidates(running: Trained, *experts: str) -> None:
    """What is left of candidates when their processes are killed: nothing."""
    backend: Any = running.cluster._backend
    for host in backend._hosts.values():
        for id in list(host._training._candidates):
            if not experts or id in experts:
                del host._training._candidates[id]


def test_what_serves_changes_at_publish_alone(running: Trained) -> None:
    before = running.client.call("l", X)
    with running.client.train("l", **SGD) as session:
        losses = descend(session, running.client, 30)
        assert losses[-1] < losses[0]
        during = running.client.call("l", X)
        assert (during.versions, during.epoch) == (before.versions, before.epoch)
        assert (during.output == before.output).all()
        own = gate()
        outcome = session.publish(gate=own)
        after = running.client.call("l", X)
        assert after.epoch == before.epoch + 1 == outcome.epoch
        assert all(after.versions[id] != before.versions[id] for id in ("l/e0", "l/e1", "l/e2", "l/gate"))
        moe = RemoteMoE(running.client, "l", gate=own, session=session)
        assert torch.allclose(torch.as_tensor(after.output), moe(X), atol=1e-6)
        descend(session, running.client, 2, 30)  # it goes on, and may publish again
        assert session.publish().epoch == outcome.epoch + 1
    assert running.client.training_sessions() == []
    running.client.train("l", **SGD).abort()


def test_some_experts_are_published_and_the_others_serve_on(running: Trained) -> None:
    before = running.client.call("l", X, top_k=3).versions
    with running.client.train("l", **SGD) as session:
        descend(session, running.client, 3)
        with pytest.raises(InvalidRequest, match="'l/e9' is no expert of this session"):
            session.publish(experts=["l/e9"])
        outcome = session.publish(experts=["l/e1"], probe=X, max_drift=9.0)
        assert set(outcome.after) == {"l/e1"}
        after = running.client.call("l", X, top_k=3).versions
        assert {id for id, version in after.items() if before[id] != version} == {"l/e1"}
        assert set(session.publish().after) >= {"l/e0", "l/e2"}  # what was kept back may follow


def test_lost_candidates_get_back_what_they_had_learned(running: Trained) -> None:
    with running.client.train("l", **SGD, durable_every=None) as plain:
        losses = descend(plain, running.client, 12)
        wanted = weights_of(plain)
    for every in (None, 1, 5):
        with running.attached.train("l", **SGD, durable_every=every) as session:
            found: list[float] = []
            for number in range(12):
                if number % 3 == 1:
                    lose_candidates(running, f"l/e{number % 2}")
                if number == 8:
                    lose_candidates(running)
                found += descend(session, running.attached, 1, number)
            assert found == losses
            lose_candidates(running)
            same = weights_of(session)
            assert all(torch.equal(same[name], wanted[name]) for name in wanted)
            assert session.durable == (every or 0) * (12 // (every or 1))
            assert (sum(entry["lost_steps"] for entry in session.restored) > 0) == (every != 1)


def test_a_candidate_lost_between_its_passes_gets_them_again(running: Trained) -> None:
    def train(lose: bool) -> dict[str, Tensor]:
        with running.client.train("l", **SGD, accumulate=1, clip_norm=0.1) as session:
            moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
            for number in range(3):
                first, second = moe(rows(number)), moe(rows(number + 50))
                if lose:
                    lose_candidates(running, "l/e1")
                F.mse_loss(first, rows(number)).backward()
                if lose:
                    lose_candidates(running, "l/e0", "l/e1")
                F.mse_loss(second, rows(number)).backward()
                if lose:
                    lose_candidates(running)
                session.step()
            return weights_of(session)

    plain, lossy = train(lose=False), train(lose=True)
    assert all(torch.equal(plain[name], lossy[name]) for name in plain)


def test_every_message_two_or_three_times_is_as_if_once(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.client.train("l", **SGD) as session:
        descend(session, running.client, 10)
        wanted = weights_of(session)
    once, sent = TrainingDesk.answer, [0]

    def repeatedly(desk: TrainingDesk, call: Any) -> Any:
        sent[0] += 1
        for _ in range(sent[0] % 3):
            once(desk, call)
        return once(desk, call)

    monkeypatch.setattr(TrainingDesk, "answer", repeatedly)
    with running.client.train("l", **SGD) as session:
        descend(session, running.client, 10)
        found = weights_of(session)
    assert sent[0] > 30
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_session_is_resumed_where_it_was_durable(tmp_path: Path) -> None:
    layer = layer_of(tmp_path, gates.TopK(WIDTH, 3, k=2))
    with trained_cluster(tmp_path, layer) as running:
        with running.client.train("l", **SGD) as plain:
            losses = descend(plain, running.client, 10)
        session = running.client.train("l", **SGD, durable_every=None)

        def interrupted() -> None:
            with session:
                assert descend(session, running.client, 4) == losses[:4]
                session.save(b"what the caller needs")
                descend(session, running.client, 3, 4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
    with trained_cluster(tmp_path, layer) as running:
        (told,) = running.client.training_sessions()
        assert (told["id"], told["durable"], told["layer"]) == (session.id, 4, "l")
        with running.client.train("l", resume=session.id, **SGD) as again:
            assert (again.step_count, again.durable, again.saved) == (4, 4, b"what the caller needs")
            assert descend(again, running.client, 6, 4) == losses[4:]


def test_an_expert_has_one_session(running: Trained) -> None:
    with running.client.train("l", experts=["l/e0", "l/e1"], **SGD) as session:
        with pytest.raises(FailedPrecondition, match=rf"l/e1 is being trained by process {os.getpid()} on "):
            running.attached.train("l", experts=["l/e1", "l/e2"], **SGD)
        with running.client.train("l", experts=["l/e2"], **SGD) as other:
            assert len(running.client.training_sessions()) == 2
            with pytest.raises(ConfigError, match="does not train l/e0"):
                RemoteMoE(running.client, "l", session=other)
        assert [told["id"] for told in running.client.training_sessions()] == [session.id]
        running.client.end_training(session.id)
        with pytest.raises(NotFound, match="no such session"):
            session.save()
        session.closed = True


def test_a_session_belongs_to_its_token(running: Trained) -> None:
    tokens = {role: read_token(token_path(running.name), role) for role in Role}
    with (
        Client(running.cluster.endpoint, token=tokens[Role.OPERATOR]) as operator,
        Client(running.cluster.endpoint, token=tokens[Role.READER]) as reader,
        Client(running.cluster.endpoint, token=tokens[Role.ADMIN]) as admin,
    ):
        with pytest.raises(PermissionDenied):
            reader.train("l", **SGD)
        with pytest.raises(PermissionDenied):
            reader.training_sessions()
        with admin.train("l", **SGD) as session:
            with pytest.raises(PermissionDenied, match="belongs to process"):
                operator.train("l", resume=session.id)
            with pytest.raises(PermissionDenied, match="belongs to process"):
                operator.end_training(session.id)
        RemoteMoE(reader, "l", gate=gate())(X).sum().backward()  # gradients of what serves are anyone's
        kept = operator.train("l", **SGD)
        admin.end_training(kept.id)


def test_bad_input_is_one_clear_error_and_nothing_changes(running: Trained) -> None:
    before = running.client.call("l", X)
    train = running.client.train
    with pytest.raises(ConfigError, match=r"not one of torch\.optim"):
        train("l", optimizer="os:system")
    with pytest.raises(ConfigError, match="takes no argument"):
        train("l", optimizer="torch.optim:SGD", learning_rate=1.0)
    with pytest.raises(NotFound, match="there is no layer"):
        train("m", **SGD)
    with pytest.raises(InvalidRequest, match="is no expert of layer l"):
        train("l", experts=["l/e9"], **SGD)
    with pytest.raises(InvalidRequest, match="accumulate"):
        train("l", accumulate=0, **SGD)
    with pytest.raises(ConfigError, match="needs total_steps"):
        train("l", schedule="cosine", **SGD)
    with pytest.raises(InvalidRequest, match="32 hexadecimal digits"):
        train("l", resume="../../etc")
    with pytest.raises(NotFound):
        train("l", resume="0" * 32)
    assert running.client.training_sessions() == []  # those that were refused hold nothing
    with train("l", **SGD) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        with pytest.raises(FailedPrecondition, match="nothing to update with"):
            session.step()
        start = weights_of(session)
        loss = F.mse_loss(moe(X), X) * float("nan")
        loss.backward()
        with pytest.raises(FailedPrecondition, match=r"gradients of .*l/e0.* are not finite"):
            session.step()
        assert all(torch.equal(start[name], now) for name, now in weights_of(session).items())
        late = moe(X)
        moe(X).sum().backward()
        session.step()
        with pytest.raises(FailedPrecondition, match="call forward again after each step"):
            late.sum().backward()
        with pytest.raises(SpecMismatch, match="the gradients have the shape"):
            session.backward(*_request(session, gradients=torch.ones(16, WIDTH + 1)))
        with pytest.raises(InvalidRequest, match="gradients for"):
            session.backward(*_request(session, gradients=torch.ones(3, WIDTH)))
        moe(X).sum().backward()
        session.step()
    after = running.client.call("l", X)
    assert after.versions == before.versions
    assert (after.output == before.output).all()


def _request(session: TrainingSession, gradients: Tensor) -> tuple[Any, ...]:
    tensors = {"rows": X, "index": torch.arange(16), "weights": torch.ones(16), "gradients": gradients}
    wired = {name: to_wire(tensor) for name, tensor in tensors.items()}
    return [("l/e0", "", 0, 16, 0)], wired, 0, session.step_count + 1


def test_a_diverged_candidate_is_not_published(running: Trained) -> None:
    before = running.client.call("l", X)
    with running.client.train("l", optimizer=None) as session:
        learned = {id: tensors_from_bytes(content)[0] for id, content in session.weights().items()}
        far = {name: tensor * 50 for name, tensor in learned["l/e1"].items()}
        session.load({"l/e1": tensors_to_bytes(far)})
        for refused in ({"max_drift": 0.5, "probe": X.numpy()}, {"max_drift": 0.5}):
            with pytest.raises(FailedPrecondition, match="l/e1"):
                session.publish(**refused)
        with pytest.raises(SpecMismatch, match="not finite"):
            session.load({"l/e1": tensors_to_bytes({n: t * float("nan") for n, t in far.items()})})
        assert running.client.call("l", X).versions == before.versions
        session.load({"l/e1": tensors_to_bytes(learned["l/e1"])})
        assert session.publish(max_drift=0.5, probe=X.numpy()).epoch == before.epoch + 1


def test_a_swap_by_another_is_not_overridden(running: Trained, tmp_path: Path) -> None:
    with running.client.train("l", **SGD) as session:
        descend(session, running.client, 1)
        path = tmp_path / "other.safetensors"
        path.write_bytes(session.weights()["l/e0"])
        swapped = running.client.swap({"l/e0": path})
        with pytest.raises(Aborted):
            session.publish()
        assert running.client.status()["epoch"] == swapped.epoch


def test_a_publication_that_nobody_noted_is_found_again(running: Trained) -> None:
    session = running.client.train("l", **SGD)
    descend(session, running.client, 2)
    session.save()
    sends: Any = session._delivery.send

    def interrupted(meta: dict[str, Any], *more: Any) -> Any:
        if meta["op"] == "rebase" and not meta["publishing"]:
            raise KeyboardInterrupt
        return sends(meta, *more)

    session._delivery.send = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.publish()
    epoch = running.client.status()["epoch"]
    with running.client.train("l", resume=session.id, **SGD) as again:
        descend(again, running.client, 1, 2)
        assert again.publish().epoch == epoch + 1
        assert again.versions == {id: running.client.call("l", X).versions[id] for id in again.experts}


def test_an_optimizer_of_the_callers_own(running: Trained) -> None:
    with running.client.train("l", **SGD, durable_every=None) as session:
        wanted = descend(session, running.client, 5)
    with running.client.train("l", optimizer=None, seed=3) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        own = {id: tensors_from_bytes(content)[0] for id, content in session.weights().items()}
        momentum: dict[str, Tensor] = {}
        found = []
        for number in range(5):
            x = rows(number, 8)
            loss = F.mse_loss(moe(x), x.sin())
            loss.backward()
            for id, content in session.gradients().items():
                for name, gradient in tensors_from_bytes(content)[0].items():
                    key = f"{id}.{name}"
                    momentum[key] = momentum[key] * 0.9 + gradient if key in momentum else gradient.clone()
                    own[id][name] -= 0.05 * momentum[key]
            session.load({id: tensors_to_bytes(tensors) for id, tensors in own.items()})
            found.append(float(loss.detach()))
        assert found == pytest.approx(wanted, rel=1e-5)
        with pytest.raises(FailedPrecondition, match="no optimizer"):
            session.step()


def test_accumulated_steps_are_the_mean_of_their_gradients(running: Trained) -> None:
    with running.client.train("l", **SGD) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        x = rows(1, 8)
        F.mse_loss(moe(x), x.sin()).backward()
        session.step()
        wanted = weights_of(session)
    with running.client.train("l", **SGD, accumulate=2) as session:
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        for half in (x[:4], x[4:]):
            F.mse_loss(moe(half), half.sin()).backward()
            told = session.step()
        assert (told.applied, told.step) == (True, 1)
        found = weights_of(session)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a disk with no more room than this: writing more fails with an error."""
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_loses_nothing_that_is_durable(running: Trained) -> None:
    with running.client.train("l", **SGD, durable_every=None) as session:
        descend(session, running.client, 2)
        assert session.save() == 2
        descend(session, running.client, 2, 2)
        wanted = weights_of(session)
        with no_file_above(100), pytest.raises(FailedPrecondition, match="step 4 cannot be saved, and step 2 stays"):
            session.save()
        lose_candidates(running)
        found = weights_of(session)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert session.save() == session.durable == 4
        left = sorted(path.name for path in (running.state_dir / "training" / session.id).iterdir())
        assert [name.partition(".")[0] for name in left] == ["4", "session"]


def test_plain_functions_are_not_trained_and_have_gradients(tmp_path: Path) -> None:
    spec = TensorSpec((2,), "float32")
    layer = Layer("l", gates.Fixed([0.5, 0.5]), {"s": Expert("torch:sin"), "n": Expert("numpy:cos")}, input=spec)
    with trained_cluster(tmp_path, layer) as running:
        with pytest.raises(ConfigError, match="only modules have parameters"):
            running.client.train("l", **SGD)
        x = torch.ones(3, 2, requires_grad=True)
        weights = torch.tensor([[2.0], [1.0], [0.0]])
        moe = RemoteMoE(running.client, "l")
        moe(x, indices=torch.zeros(3, 1, dtype=torch.int64), weights=weights).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad, x.detach().cos() * weights)
        with pytest.raises((FailedPrecondition, SpecMismatch), match="l/n"):
            moe(x, indices=torch.ones(3, 1, dtype=torch.int64), weights=weights).sum().backward()


def test_an_expert_that_does_not_answer_is_left_out(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TrainingDesk.answer
    lost = {"l/e1"}

    def failing(desk: TrainingDesk, call: Any) -> Any:
        if call.expert in lost and call.meta["op"] != "open":
            raise Unavailable("it is not there; retry")
        return whole(desk, call)

    with running.client.train("l", **SGD, on_missing="leave_out", patience=0.0, durable_every=None) as session:
        descend(session, running.client, 2)
        monkeypatch.setattr(TrainingDesk, "answer", failing)
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        x = rows(40, 32).requires_grad_(True)
        y = moe(x)
        assert set(moe.left_out) == {"l/e1"}
        with torch.no_grad():
            routing = gate()(x)
        both = [{0, 2} == set(row) for row in routing.indices_TK.tolist()]
        y.sum().backward()
        told = session.step()
        assert (set(told.left_out), set(told.updated)) == ({"l/e1"}, {"l/e0", "l/e2"})
        assert any(both)
        assert session.left_out >= 2
        lost.clear()
        descend(session, running.client, 3, 3)
        assert session.save() == 6
        eventually(lambda: session.durable == 6, 5, "all experts are at one step")
    with running.client.train("l", **SGD, patience=0.0) as strict:
        lost.add("l/e1")
        with pytest.raises(Unavailable, match="it is not there"):
            descend(strict, running.client, 1)
        lost.clear()


def test_a_backward_pass_that_failed_leaves_nothing_behind(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other experts have computed theirs: neither the next batch nor the next step may take it for its own."""
    whole, fails = TrainingDesk.answer, [False]

    def failing(desk: TrainingDesk, call: Any) -> Any:
        if fails[0] and call.expert == "l/e1" and call.meta["op"] == "backward":
            raise ExpertFailed("told to")
        return whole(desk, call)

    monkeypatch.setattr(TrainingDesk, "answer", failing)
    found = []
    for fail in (False, True):
        for drops in (True, False):
            with running.client.train("l", **SGD) as session:
                moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
                if fail:
                    loss = F.mse_loss(moe(rows(77, 8)), rows(78, 8)) * 100
                    fails[0] = True
                    with pytest.raises(ExpertFailed, match="told to"):
                        loss.backward()
                    fails[0] = False
                    if drops:
                        session.zero_grad()
                x = rows(1, 8)
                loss = F.mse_loss(moe(x, indices=torch.zeros(8, 1, dtype=torch.int64), weights=torch.ones(8, 1)), x)
                loss.backward()
                session.step()
                found.append(weights_of(session))
    assert all(torch.equal(other[name], tensor) for other in found[1:] for name, tensor in found[0].items())


def test_who_resumes_a_session_has_it_alone(running: Trained) -> None:
    first = running.client.train("l", **SGD)
    descend(first, running.client, 2)
    first.save()
    second = running.client.train("l", resume=first.id, **SGD)
    with pytest.raises(Fenced, match="another process has resumed"):
        descend(first, running.client, 1)
    assert len(descend(second, running.client, 2, 2)) == 2
    with pytest.raises(InvalidRequest, match="this session trains layer l, not m"):
        running.client.train("m", resume=first.id)
    second.abort()
    second.closed = False
    second.abort()  # as where the answer to the first was lost


def test_a_step_that_was_not_finished_is_finished_first(running: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lost = TrainingDesk.answer, set[str]()

    def failing(desk: TrainingDesk, call: Any) -> Any:
        if call.expert in lost and call.meta["op"] in ("update", "load"):
            raise Unavailable("it is not there; retry")
        return whole(desk, call)

    monkeypatch.setattr(TrainingDesk, "answer", failing)
    with running.client.train("l", **SGD, patience=0.0) as plain:
        wanted = descend(plain, running.client, 3)
    with running.client.train("l", **SGD, patience=0.0) as session:
        found = descend(session, running.client, 1)
        moe = RemoteMoE(running.client, "l", gate=gate(), session=session)
        x = rows(1, 8)
        loss = F.mse_loss(moe(x), x.sin())
        loss.backward()
        with pytest.raises(InvalidRequest, match="learning rate must be a finite number"):
            session.step(lr=float("inf"))
        lost.add("l/e2")
        with pytest.raises(Unavailable, match="it is not there"):
            session.step()
        for refused in (lambda: moe(x), session.zero_grad, session.save, session.publish):
            with pytest.raises(FailedPrecondition, match=r"call step\(\) again"):
                refused()
        lost.clear()
        session.step()
        found += [float(loss.detach()), *descend(session, running.client, 1, 2)]
        assert found == wanted
    with running.client.train("l", optimizer=None, patience=0.0) as session:
        one = session.weights()
        two = {id: tensors_to_bytes({n: t * 2 for n, t in tensors_from_bytes(c)[0].items()}) for id, c in one.items()}
        lost.add("l/e2")
        with pytest.raises(Unavailable):
            session.load(two)
        with pytest.raises(FailedPrecondition, match="load the same weights again"):
            session.load(one)
        lost.clear()
        session.load(two)
        assert {id: tensors_from_bytes(c)[0]["up_proj.bias"].tolist() for id, c in session.weights().items()} == {
            id: tensors_from_bytes(c)[0]["up_proj.bias"].tolist() for id, c in two.items()
        }


def test_a_candidate_that_was_left_behind_is_opened_again(running: Trained) -> None:
    backend: Any = running.cluster._backend
    desks = [host._training for host in backend._hosts.values()]
    with running.client.train("l", **SGD, durable_every=2) as plain:
        wanted = descend(plain, running.client, 6)
    with running.client.train("l", **SGD, durable_every=2) as session:
        found = descend(session, running.client, 1)
        old = [copy.deepcopy(desk._candidates) for desk in desks]  # as on a replica that was out of reach for a while
        found += descend(session, running.client, 3, 1)
        for desk, candidates in zip(desks, old, strict=True):
            desk._candidates = candidates
        assert found + descend(session, running.client, 2, 4) == wanted


def test_an_operator_cannot_take_the_session_of_an_attached_process(running: Trained) -> None:
    with running.attached.train("l", **SGD) as session:
        with pytest.raises(PermissionDenied, match="belongs to process"):
            running.client.train("l", resume=session.id)
        with pytest.raises(PermissionDenied):
            running.client.end_training(session.id)


def test_a_few_bytes_cannot_ask_for_much(running: Trained) -> None:
    tensors = {"rows": rows(0, 1), "index": torch.zeros(1000, dtype=torch.int64)}
    wired = {name: to_wire(tensor) for name, tensor in tensors.items()}
    meta: dict[str, Any] = {"op": "forward", "layer": "l", "parts": [["l/e0", "", 0, 1000, 0]]}
    with pytest.raises(InvalidRequest, match="may be chosen at most"):
        running.client._training("Pass", meta, wired)
    meta["parts"] = [["l/e0", "v9-aaaaaaaaaaaa", 0, 1, 0]]
    with pytest.raises(VersionGone, match="is of no epoch that is kept"):
        running.client._training("Pass", meta, wired | {"index": to_wire(torch.zeros(1, dtype=torch.int64))})


def test_a_damaged_record_holds_up_nobody_else(running: Trained) -> None:
    session = running.client.train("l", experts=["l/e0"], **SGD)
    path = running.state_dir / "training" / session.id / "session.json"
    path.write_text("{")
    with running.client.train("l", experts=["l/e1"], **SGD):
        assert [told["experts"] for told in running.client.training_sessions()] == [["l/e1"]]
    with Client(running.cluster.endpoint, token=read_token(token_path(running.name), Role.ADMIN)) as admin:
        admin.end_training(session.id)
    assert not path.exists()
