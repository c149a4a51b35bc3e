"""Fan-out over a transport that answers when the test says so: few messages, retries, nothing lost or mixed up."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers.waiting import run_async, settle, until
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import (
    DataLoss,
    ExpertFailed,
    ExpertMeshError,
    SpecMismatch,
    TooLarge,
    Unavailable,
    VersionGone,
)
from expertmesh.experts.protocol import ExpertCall, ExpertReply, PartFailure
from expertmesh.router.fanout import fanout as module
from expertmesh.router.fanout import lane as lane_module
from expertmesh.router.fanout import lateness
from expertmesh.router.fanout.answers import Answered, DiedTogether
from expertmesh.router.fanout.fanout import MAX_ATTEMPTS, MAX_DEATHS, WINDOW, Fanout, Result
from expertmesh.router.fanout.lane import Job, Lane
from expertmesh.router.fanout.replica_view import READY, Replica, View
from expertmesh.router.fanout.telemetry import Telemetry
from expertmesh.router.fanout.transport import Cancel, Died, Done, Lost
from expertmesh.router.fanout.work import Work

V = "v1-a"
FACTORS = {"l/a": 2.0, "l/b": 3.0, "l/c": 5.0}
X = torch.arange(12.0).reshape(6, 2) + 1


@dataclass(eq=False)
class Sent:
    """One message under way."""

    replica: str
    call: ExpertCall
    done: Done
    over: bool = False
    cancelled: bool = False

    def outputs(self) -> list[Any]:
        rows, index = self.call.rows, self.call.row_index
        if index is not None:
            rows = rows[index]
        return [rows[part.start : part.stop] * FACTORS[part.expert] for part in self.call.parts]

    def answer(self, *outputs: Any) -> None:
        self.tell(ExpertReply("1", tuple(outputs or self.outputs())))

    def fail(self, error: ExpertMeshError) -> None:
        self.tell(error)

    def tell(self, reply: ExpertReply | ExpertMeshError | Died) -> None:
        """Answer once; what was given up may still be answered, late."""
        if not self.over:
            self.over = True
            self.done(reply)

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(eq=False)
class Wire:
    """A transport whose messages wait for the test."""

    sent: list[Sent] = field(default_factory=list)
    most: int = 0
    carried: Counter[str] = field(default_factory=Counter)
    responding: set[str] = field(default_factory=set)

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        sent = Sent(replica.id, call, done)
        self.sent.append(sent)
        self.most = max(self.most, sum(s.replica == replica.id for s in self.open()))
        return sent.cancel

    async def responds(self, replica: Replica) -> bool:
        return replica.id in self.responding

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None: ...

    def close(self) -> None: ...

    def open(self) -> list[Sent]:
        return [sent for sent in self.sent if not sent.over and not sent.cancelled]


@dataclass(eq=False)
class FanoutOverWire:
    """A fan-out, its view and its wire."""

    wire: Wire
    view: View
    telemetry: Telemetry
    fanout: Fanout
    replicas: dict[str, Replica]
    jobs: dict[asyncio.Future[Any], Job] = field(default_factory=dict)

    def report(self) -> None:
        self.view.update(self.replicas.values())
        self.fanout.refresh()

    def submit(self, expert: str = "l/a", *rows: int, x: Tensor = X) -> asyncio.Future[Tensor]:
        return self.submit_work(Work(((expert, V, len(rows or (0,))),), x, torch.tensor(rows or (0,))))

    def submit_work(self, work: Work) -> asyncio.Future[Any]:
        """The future gets the one output of the work, or the whole answer where it has several experts."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Result) -> None:
            output: Any = result
            if isinstance(result, Answered) and len(work.experts) == 1:
                (output,) = result.outputs
            if answer.done():
                return  # cancelled in this very turn
            if isinstance(output, ExpertMeshError):
                answer.set_exception(output)
            else:
                answer.set_result(output)

        job = self.jobs[answer] = self.fanout.submit(work, done)
        answer.add_done_callback(lambda ended: self.fanout.cancel(job) if ended.cancelled() else None)
        return answer


def fanout_of(*names: str, experts: tuple[str, ...] = ("l/a",)) -> FanoutOverWire:
    held = frozenset((expert, V) for expert in experts)
    replicas = {name: Replica(name, experts, "1", held, READY) for name in names}
    wire, view, telemetry = Wire(), View(random.Random(0)), Telemetry()
    mesh = FanoutOverWire(wire, view, telemetry, Fanout(wire, view, telemetry), replicas)
    mesh.report()
    return mesh


def test_what_is_submitted_together_goes_together() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        jobs = [mesh.submit("l/a", row, row + 1) for row in range(4)]
        await settle()
        (sent,) = mesh.wire.sent
        assert [part.expert for part in sent.call.parts] == ["l/a"] * 4
        assert mesh.view.rows_in_flight() == {"r": 8}
        sent.answer()
        for row, job in enumerate(jobs):
            assert torch.equal(await job, X[row : row + 2] * 2)
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 0}
        assert mesh.telemetry.rows["l/a"] == 8
        assert mesh.telemetry.messages["r"] == 1

    run_async(main())


def test_what_comes_while_the_window_is_full_waits_and_goes_in_one_message() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        jobs = []
        for row in range(6):
            jobs.append(mesh.submit("l/a", row))
            await settle()
        assert len(mesh.wire.sent) == WINDOW
        assert mesh.fanout.waiting() == {"r": 6 - WINDOW}
        mesh.wire.sent[0].answer()
        await settle()
        assert len(mesh.wire.sent) == WINDOW + 1
        assert len(mesh.wire.sent[-1].call.parts) == 6 - WINDOW
        assert mesh.fanout.waiting() == {"r": 0}
        for sent in mesh.wire.sent:
            sent.answer()
        for row, job in enumerate(jobs):
            assert torch.equal(await job, X[[row]] * 2)

    run_async(main())


def test_how_long_rows_waited_is_counted_in_the_router_and_in_the_replica() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "idle")
        mesh.replicas.pop("idle")
        mesh.report()
        jobs = []
        for rows in ((0,), (1,), (2, 3)):
            jobs.append(mesh.submit("l/a", *rows))
            await settle()
        assert len(mesh.wire.open()) == WINDOW == 2
        mesh.jobs[jobs[2]].since -= 50.0  # as if it had come so long ago
        load = mesh.fanout.loads()["r"]
        assert (load.rows, load.waiting, load.computing) == (2, 2, 0.0)
        assert load.waited == pytest.approx(100.0, abs=5.0)
        mesh.wire.sent[0].tell(ExpertReply("1", tuple(mesh.wire.sent[0].outputs()), queued=0.5, computed=0.25))
        await settle()
        mesh.wire.sent[2].tell(ExpertReply("1", tuple(mesh.wire.sent[2].outputs()), queued=20.0, computed=0.5))
        mesh.wire.sent[1].answer()
        await settle()
        load = mesh.fanout.loads()["r"]
        assert (load.rows, load.waiting, load.computing) == (4, 0, 0.75)
        assert load.waited == pytest.approx(140.5, abs=5.0)
        assert mesh.fanout.loads().keys() == {"r"}

    run_async(main())


def test_experts_of_a_pack_get_each_row_once() -> None:
    async def main() -> None:
        mesh = fanout_of("pack", "other", experts=("l/a", "l/b", "l/c"))
        wanted = {"l/a": (0, 1, 3), "l/b": (1, 3, 5), "l/c": (0, 5)}
        pairs = torch.tensor([row for rows in wanted.values() for row in rows])
        rows_R, index_P = pairs.unique(return_inverse=True)
        work = Work(tuple((expert, V, len(rows)) for expert, rows in wanted.items()), X, rows_R, index_P)
        together = mesh.submit_work(work)
        await settle()
        (sent,) = mesh.wire.sent
        assert torch.equal(sent.call.rows, X[[0, 1, 3, 5]])
        sent.answer()
        for (expert, rows), output in zip(wanted.items(), (await together).outputs, strict=True):
            assert torch.equal(output, X[list(rows)] * FACTORS[expert])

    run_async(main())


def test_unlike_rows_and_too_many_rows_do_not_share_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "MAX_ROWS_PER_MESSAGE", 4)

    async def main() -> None:
        mesh = fanout_of("r")
        kinds = [X, X.double(), X.reshape(6, 2, 1), X, X, X]
        sizes = [1, 1, 1, 3, 2, 6]
        jobs = [mesh.submit("l/a", *range(size), x=kind) for kind, size in zip(kinds, sizes, strict=True)]
        while not all(job.done() for job in jobs):
            await settle()
            for sent in mesh.wire.open():
                sent.answer()
        for job, kind, size in zip(jobs, kinds, sizes, strict=True):
            answer = await job
            assert answer.dtype == kind.dtype
            assert torch.equal(answer, kind[:size] * 2)
        assert max(int(sent.call.rows.shape[0]) for sent in mesh.wire.sent) == 6  # alone, since larger than 4
        assert len(mesh.wire.sent) == 6

    run_async(main())


def test_a_lost_message_goes_to_another_replica_and_the_lost_one_is_a_suspect() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        job = mesh.submit("l/a", 2)
        await settle()
        (first,) = mesh.wire.sent
        first.fail(Unavailable("the socket closed"))
        await settle()
        second = mesh.wire.sent[1]
        assert {first.replica, second.replica} == {"r", "s"}
        assert not mesh.view.holds(first.replica, "l/a", V)
        assert mesh.view.rows_in_flight() == {first.replica: 0, second.replica: 1}
        second.answer()
        assert torch.equal(await job, X[[2]] * 2)
        assert mesh.telemetry.retries == 1
        assert mesh.telemetry.errors["l/a"] == 1

    run_async(main())


def test_attempts_are_bounded_and_the_last_error_is_told() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t", "u", "v")
        job = mesh.submit()
        for attempt in range(MAX_ATTEMPTS):
            await settle()
            assert len(mesh.wire.sent) == attempt + 1
            mesh.wire.sent[-1].fail(Unavailable(f"lost {attempt}"))
        with pytest.raises(Unavailable, match=f"l/a did not answer: lost {MAX_ATTEMPTS - 1}"):
            await job
        assert len({sent.replica for sent in mesh.wire.sent}) == MAX_ATTEMPTS
        await settle()
        assert set(mesh.view.rows_in_flight().values()) == {0}

    run_async(main())


def test_with_nobody_else_the_error_comes_at_once() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        job = mesh.submit()
        await settle()
        mesh.wire.sent[0].fail(Unavailable("gone"))
        with pytest.raises(Unavailable, match="every replica of l/a is down or restarting"):
            await job
        with pytest.raises(Unavailable):
            await mesh.submit()
        with pytest.raises(Unavailable, match="no replica of l/x is ready"):
            await mesh.submit("l/x")

    run_async(main())


def test_a_replica_that_lost_the_version_is_passed_over_and_is_no_suspect() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        job = mesh.submit()
        await settle()
        first = mesh.wire.sent[0]
        first.answer(PartFailure("VersionGone", "not loaded in this replica"))
        await settle()
        assert mesh.wire.sent[1].replica != first.replica
        assert mesh.view.holds(first.replica, "l/a", V)
        mesh.wire.sent[1].answer()
        assert torch.equal(await job, X[[0]] * 2)

    run_async(main())


def test_a_version_that_is_gone_everywhere_is_told_as_such() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        job = mesh.submit()
        await settle()
        for name in ("r", "s"):
            mesh.replicas[name] = Replica(name, ("l/a",), "1", frozenset({("l/a", "v2-b")}), READY)
        mesh.report()
        mesh.wire.sent[0].answer(PartFailure("VersionGone", "not loaded in this replica"))
        with pytest.raises(VersionGone, match="no replica holds l/a v1-a any more"):
            await job

    run_async(main())


def test_the_experts_own_failure_is_not_tried_again_and_harms_no_other_part() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        bad, good = mesh.submit("l/a", 0), mesh.submit("l/a", 1)
        await settle()
        (sent,) = mesh.wire.sent
        sent.answer(PartFailure("ExpertFailed", "l/a raised"), X[[1]])
        assert torch.equal(await good, X[[1]])
        with pytest.raises(ExpertFailed, match="l/a raised"):
            await bad
        assert len(mesh.wire.sent) == 1
        assert mesh.telemetry.retries == 0

    run_async(main())


def test_an_error_of_an_unknown_kind_is_an_internal_one() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        job = mesh.submit()
        await settle()
        mesh.wire.sent[0].answer(PartFailure("NoSuchClass", "odd"))
        with pytest.raises(ExpertMeshError, match="odd") as caught:
            await job
        assert type(caught.value) is ExpertMeshError

    run_async(main())


@pytest.mark.parametrize("raised", [SpecMismatch("no"), ExpertMeshError("odd")])
def test_whatever_a_transport_tells_nobody_waits_for_ever(raised: ExpertMeshError, caplog: Any) -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        job = mesh.submit()
        await settle()
        mesh.wire.sent[0].fail(raised)
        with pytest.raises(ExpertMeshError) as caught:
            await asyncio.wait_for(job, 20)
        assert type(caught.value) is type(raised)
        again = mesh.submit()
        await settle()
        mesh.wire.sent[1].answer()
        assert torch.equal(await again, X[[0]] * 2)

    with caplog.at_level(logging.CRITICAL):
        run_async(main())


@pytest.mark.parametrize("outputs", [0, 1, 3])
def test_a_reply_with_another_number_of_parts_is_refused(outputs: int) -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        jobs = [mesh.submit("l/a", 0), mesh.submit("l/a", 1)]
        await settle()
        sent = mesh.wire.sent[0]
        sent.tell(ExpertReply("1", (X[[0]],) * outputs))
        for job in jobs:
            with pytest.raises(DataLoss, match=f"answered {outputs} of 2 parts"):
                await asyncio.wait_for(job, 20)

    run_async(main())


def test_what_cannot_be_written_as_a_message_is_told_and_the_lane_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        mesh = fanout_of("r")

        def refuse(replica: Replica, call: ExpertCall, done: Done) -> Cancel:
            raise TooLarge("the message's header has too many bytes")

        with monkeypatch.context() as patch:
            patch.setattr(mesh.wire, "send", refuse)
            job = mesh.submit()
            with pytest.raises(TooLarge):
                await asyncio.wait_for(job, 20)
        again = mesh.submit()
        await settle()
        mesh.wire.sent[0].answer()
        assert torch.equal(await again, X[[0]] * 2)
        assert mesh.view.rows_in_flight() == {"r": 0}

    run_async(main())


def test_work_that_nobody_waits_for_is_not_sent() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        first = [mesh.submit() for _ in range(2)]
        mesh.fanout.cancel(mesh.jobs[first[1]])  # before it was sent at all
        await settle()
        assert len(mesh.wire.sent[0].call.parts) == 1
        second = mesh.submit()
        await settle()
        waiting = [mesh.submit("l/a", row) for row in range(4)]
        await settle()
        for job in waiting[1:]:
            job.cancel()
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 3}
        mesh.wire.sent[0].answer()
        await settle()
        assert [len(sent.call.parts) for sent in mesh.wire.sent] == [1, 1, 1]
        for sent in mesh.wire.sent:
            sent.answer()
        await asyncio.gather(first[0], second, waiting[0])
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 0}

    run_async(main())


def test_a_new_incarnation_gets_what_the_old_one_had_and_late_answers_land_nowhere() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        jobs = [mesh.submit("l/a", 0)]
        await settle()
        jobs += [mesh.submit("l/a", 1)]
        await settle()
        jobs += [mesh.submit("l/a", 2)]  # waits: the window is full
        await settle()
        old = list(mesh.wire.sent)
        mesh.replicas["r"] = Replica("r", ("l/a",), "2", frozenset({("l/a", V)}), READY)
        mesh.report()
        for sent in old:
            sent.answer(torch.full((1, 2), -1.0))  # late, and wrong
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 3}
        for sent in mesh.wire.sent[len(old) :]:
            sent.answer()
        await settle()
        for sent in mesh.wire.open():
            sent.answer()
        for row, job in enumerate(jobs):
            assert torch.equal(await job, X[[row]] * 2)
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 0}

    run_async(main())


def test_a_replica_that_restarts_for_ever_does_not_hold_a_job_for_ever() -> None:
    async def main() -> None:
        mesh = fanout_of("r")
        job = mesh.submit()
        for number in range(2, 10):
            await settle()
            mesh.replicas["r"] = Replica("r", ("l/a",), str(number), frozenset({("l/a", V)}), READY)
            mesh.report()
        await settle()
        with pytest.raises(ExpertFailed, match="l/a ended its process: 2 replicas died while they computed these rows"):
            await job
        assert len(mesh.wire.sent) == MAX_DEATHS

    run_async(main())


def test_what_two_replicas_died_of_is_not_sent_to_a_third() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t", experts=("l/a", "l/b"))
        works = {
            "l/a": Work((("l/a", V, 1),), X, torch.tensor([0])),
            "one of the experts l/a, l/b": Work(
                (("l/a", V, 1), ("l/b", V, 1)), X, torch.tensor([0]), torch.tensor([0, 0])
            ),
        }
        for names, work in works.items():
            job = mesh.submit_work(work)
            for _ in range(MAX_DEATHS):
                await settle()
                (sent,) = mesh.wire.open()
                sent.tell(Died())
            with pytest.raises(ExpertFailed, match=f"^{names} ended its process: 2 replicas died while"):
                await job
            for name in "rst":
                mesh.replicas[name] = replace(mesh.replicas[name], incarnation=f"{names} {name}")
            mesh.report()
        await settle()
        assert not mesh.wire.open()
        assert mesh.view.rows_in_flight() == {"r": 0, "s": 0, "t": 0}

    run_async(main())


def test_only_the_rows_that_kill_fail_and_not_those_that_were_sent_with_them_or_waited_behind_them() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t", "u")
        jobs = [mesh.submit("l/a", row) for row in range(6)]
        deadly, deaths = X[1], 0
        while not all(job.done() for job in jobs):
            await settle()
            for sent in mesh.wire.open():
                if not any(torch.equal(row, deadly) for row in sent.call.rows):
                    sent.answer()
                    continue
                deaths += 1
                del mesh.replicas[sent.replica]
                for other in [sent, *(o for o in mesh.wire.open() if o.replica == sent.replica)]:
                    other.tell(Died())  # at once, with everything that is in flight to it
                mesh.report()
                break
        with pytest.raises(ExpertFailed):
            jobs.pop(1).result()
        for row, job in zip((0, 2, 3, 4, 5), jobs, strict=True):
            assert torch.equal(job.result(), X[[row]] * 2)
        assert deaths == MAX_DEATHS

    run_async(main())


def test_rows_of_several_requests_that_a_replica_died_of_are_not_sent_together_again() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t", "u")
        merged = mesh.submit_work(Work((("l/a", V, 2),), X, torch.tensor([0, 1]), merged=True))
        await settle()
        (sent,) = mesh.wire.open()
        sent.tell(Died())
        await settle()
        assert not mesh.wire.open()
        assert await merged == DiedTogether(1, frozenset({sent.replica}))
        results: list[Result] = []
        mesh.fanout.submit(Work((("l/a", V, 1),), X, torch.tensor([0])), results.append, await merged)
        await settle()
        (second,) = mesh.wire.open()
        assert second.replica != sent.replica
        second.tell(Died())
        await settle()
        assert isinstance(results[0], ExpertFailed)
        assert not mesh.wire.open()
        assert set(mesh.view.rows_in_flight().values()) == {0}

    run_async(main())


def test_rows_of_several_requests_are_sent_together_again_where_no_replica_died_of_them() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t")
        merged = mesh.submit_work(Work((("l/a", V, 2),), X, torch.tensor([0, 1]), merged=True))
        await settle()
        mesh.wire.open()[0].fail(Unavailable("there is no connection"))
        await settle()
        mesh.wire.open()[0].answer()
        assert torch.equal(await merged, X[:2] * 2)

    run_async(main())


def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in flight is late at the next turn of the loop."""
    for name in ("FLOOR_SECONDS", "COLD_SECONDS", "FACTOR"):
        monkeypatch.setattr(lateness, name, 0.0)
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    impatience(monkeypatch)


def test_a_late_message_is_sent_to_another_replica_and_the_first_answer_counts(impatient: None) -> None:
    async def main() -> None:
        for first in (0, 1):
            mesh = fanout_of("r", "s")
            job = mesh.submit("l/a", 2)
            await until(lambda mesh=mesh: len(mesh.wire.open()) == 2)  # type: ignore[misc]
            late, hedge = mesh.wire.open()
            assert {late.replica, hedge.replica} == {"r", "s"}
            (late, hedge)[first].answer(torch.full((1, 2), float(first)))
            assert torch.equal(await job, torch.full((1, 2), float(first)))
            assert hedge.cancelled == (first == 0)
            assert not late.cancelled  # its answer says that the replica is back
            late.answer(torch.full((1, 2), -1.0))
            await settle()
            assert (mesh.telemetry.hedges, mesh.telemetry.retries, mesh.telemetry.errors) == (1, 0, {})
            assert mesh.telemetry.rows["l/a"] == 1
            assert mesh.view.rows_in_flight() == {"r": 0, "s": 0}

    run_async(main())


def test_what_a_process_that_runs_is_computing_goes_to_no_other_but_what_is_behind_it_does(impatient: None) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        mesh.wire.responding = {"r", "s"}
        mesh.replicas["s"] = replace(mesh.replicas["s"], state="starting")
        mesh.report()
        jobs = []
        for row in range(WINDOW + 1):
            jobs.append(mesh.submit("l/a", row))
            await settle()
        mesh.replicas["s"] = replace(mesh.replicas["s"], state=READY)
        mesh.report()
        while not all(job.done() for job in jobs[1:]):
            await asyncio.sleep(0)
            for sent in [sent for sent in mesh.wire.open() if sent.replica == "s"]:
                sent.answer()
        await asyncio.sleep(0.005)
        (hung, *_) = mesh.wire.open()
        assert (hung.replica, jobs[0].done()) == ("r", False)
        assert not any(torch.equal(sent.call.rows, hung.call.rows) for sent in mesh.wire.sent if sent is not hung)
        hung.answer()
        assert torch.equal(await jobs[0], X[[0]] * 2)

    run_async(main())


def test_a_late_replica_gets_no_work_until_it_answers_and_what_waits_for_it_goes_elsewhere(
    impatient: None,
) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        mesh.replicas["s"] = replace(mesh.replicas["s"], state="starting")
        mesh.report()
        jobs = []
        for row in range(WINDOW + 1):  # the last one waits: the window is full
            jobs.append(mesh.submit("l/a", row))
            await settle()
        await asyncio.sleep(0.005)
        frozen = mesh.wire.open()
        assert [sent.replica for sent in frozen] == ["r"] * WINDOW  # there is no other
        assert mesh.telemetry.hedges == 0
        mesh.replicas["s"] = replace(mesh.replicas["s"], state=READY)
        mesh.report()
        while not all(job.done() for job in jobs):
            await asyncio.sleep(0)
            for sent in mesh.wire.open():
                if sent.replica == "s":
                    sent.answer()
        for row, job in enumerate(jobs):
            assert torch.equal(job.result(), X[[row]] * 2)
        assert {mesh.view.choose([("l/a", V)]).id for _ in range(20)} == {"s"}
        for sent in frozen:
            sent.answer()
        await settle()
        assert {mesh.view.choose([("l/a", V)]).id for _ in range(20)} == {"r", "s"}
        assert mesh.view.rows_in_flight() == {"r": 0, "s": 0}

    run_async(main())


def test_no_more_than_a_share_of_all_messages_is_sent_twice(impatient: None) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        for _ in range(100):
            job = mesh.submit()
            await until(mesh.wire.open)
            await asyncio.sleep(0.001)
            for sent in mesh.wire.open():
                sent.answer()
            await job
            await settle()
        assert 0 < mesh.telemetry.hedges <= lateness.BURST + 200 * lateness.SHARE

    run_async(main())


def test_where_the_second_replica_dies_the_answer_of_the_late_one_is_awaited(impatient: None) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        job = mesh.submit()
        await until(lambda: len(mesh.wire.open()) == 2)
        late, hedge = mesh.wire.open()
        hedge.tell(Died())
        await settle()
        assert not job.done()
        late.answer()
        assert torch.equal(await job, X[[0]] * 2)

    run_async(main())


def test_what_hangs_two_replicas_goes_to_no_third_which_gets_the_other_work(impatient: None) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t")
        job = mesh.submit("l/a", 1)
        await asyncio.sleep(0.02)
        hung = {sent.replica for sent in mesh.wire.open()}
        assert len(hung) == len(mesh.wire.sent) == 2
        (well,) = {"r", "s", "t"} - hung
        assert {mesh.view.choose([("l/a", V)]).id for _ in range(20)} == {well}
        mesh.wire.open()[1].answer()
        assert torch.equal(await job, X[[1]] * 2)

    run_async(main())


@pytest.mark.parametrize("reply", [Died(), Unavailable("lost"), None])
def test_where_the_second_replica_is_lost_a_third_is_asked_and_not_the_late_one_awaited(
    impatient: None, reply: Died | Unavailable | None
) -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s", "t")
        job = mesh.submit()
        await until(lambda: len(mesh.wire.open()) == 2)
        hedge = mesh.wire.open()[1]
        hedge.answer(PartFailure("VersionGone", "not here")) if reply is None else hedge.tell(reply)
        await settle()
        late, third = mesh.wire.open()
        assert {late.replica, hedge.replica, third.replica} == {"r", "s", "t"}
        third.answer()
        assert torch.equal(await job, X[[0]] * 2)

    run_async(main())


def test_a_late_replica_that_responds_and_freezes_later_is_asked_again(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(module, "ASK_SECONDS", 0.0, raising=False)
        mesh = fanout_of("r", "s")
        mesh.wire.responding = {"r", "s"}
        job = mesh.submit()
        await asyncio.sleep(0.02)
        (slow,) = mesh.wire.open()
        mesh.wire.responding.clear()
        await asyncio.sleep(0.02)
        assert len(mesh.wire.open()) == 2
        (other,) = (sent for sent in mesh.wire.open() if sent is not slow)
        other.answer()
        assert torch.equal(await job, X[[0]] * 2)

    run_async(main())


def test_a_replica_that_is_no_more_hands_its_rows_on() -> None:
    async def main() -> None:
        mesh = fanout_of("r", "s")
        jobs = [mesh.submit("l/a", row) for row in range(4)]
        await settle()
        del mesh.replicas[mesh.wire.sent[0].replica]
        mesh.report()
        for _ in range(3):
            await settle()
            for sent in mesh.wire.open():
                sent.answer()
        for row, job in enumerate(jobs):
            assert torch.equal(await job, X[[row]] * 2)
        assert set(mesh.view.rows_in_flight().values()) == {0}

    run_async(main())


def test_figures_are_read_while_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the thread of the metrics page does; here the change comes, for certain, in the middle of the reading."""

    async def main() -> None:
        mesh = fanout_of("r", "s")
        jobs = [mesh.submit("l/a", row) for row in range(6)]
        size = Work.size.fget  # type: ignore[attr-defined]

        def changing(work: Work) -> int:
            with monkeypatch.context() as patch:
                patch.setattr(Work, "size", property(size))
                jobs.append(mesh.submit("l/a", 0))
                mesh.fanout._lanes[f"lane {len(jobs)}"] = Lane(mesh.replicas["r"])
            return int(size(work))

        with monkeypatch.context() as patch:
            patch.setattr(Work, "size", property(changing))
            assert sum(mesh.fanout.waiting().values()) >= 6
        for number in range(7, len(jobs) + 1):
            mesh.fanout._lanes.pop(f"lane {number}")
        while not all(job.done() for job in jobs):
            await settle()
            for sent in mesh.wire.open():
                sent.answer()

    run_async(main())


actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "submit",
                "submit",
                "submit",
                "answer",
                "answer",
                "lose",
                "die",
                "refuse",
                "cancel",
                "restart",
                "vanish",
                "appear",
            ]
        ),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(actions, st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_happens_each_job_ends_once_with_its_own_rows(happens: list[tuple[str, int]], hedged: bool) -> None:
    async def main() -> None:
        if hedged:
            impatience(patch)
        experts = ("l/a", "l/b")
        mesh = fanout_of("r", "s", experts=experts)
        incarnations = 1
        jobs: list[tuple[str, tuple[int, ...], asyncio.Future[Tensor]]] = []
        for action, number in happens:
            waiting = mesh.wire.open()
            if action == "submit":
                expert, rows = experts[number % 2], tuple(range(number % 3, 3 + number % 4))
                jobs.append((expert, rows, mesh.submit(expert, *rows)))
            elif action == "cancel" and jobs:
                jobs[number % len(jobs)][2].cancel()
            elif action in ("restart", "appear"):
                incarnations += 1
                name = "rs"[number % 2]
                held = frozenset((expert, V) for expert in experts)
                mesh.replicas[name] = Replica(name, experts, str(incarnations), held, READY)
                mesh.report()
            elif action == "vanish":
                mesh.replicas.pop("rs"[number % 2], None)
                mesh.report()
            elif waiting:
                sent = waiting[number % len(waiting)]
                if action == "answer":
                    sent.answer()
                elif action == "die":
                    sent.tell(Died())
                elif action == "lose":
                    sent.fail(Unavailable("lost"))
                elif action == "refuse":
                    sent.answer(*(PartFailure("VersionGone", "not here") for _ in sent.call.parts))
            if number % 2:
                await settle()
        for _ in range(60):
            await settle()
            for sent in mesh.wire.open():
                sent.answer()
        assert mesh.wire.most <= WINDOW
        for expert, rows, job in jobs:
            assert job.done()
            if job.cancelled():
                continue
            error = job.exception()
            if error is None:
                assert torch.equal(job.result(), X[list(rows)] * FACTORS[expert])
            else:
                assert isinstance(error, (Unavailable, ExpertFailed))
        mesh.replicas.update({name: Replica(name, experts, "last", frozenset(), READY) for name in "rs"})
        mesh.report()
        await settle()
        assert mesh.view.rows_in_flight() == {"r": 0, "s": 0}
        assert set(mesh.fanout.waiting().values()) <= {0}

    with pytest.MonkeyPatch.context() as patch:
        run_async(main())
