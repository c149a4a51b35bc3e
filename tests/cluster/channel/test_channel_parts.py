"""The parts of the channel without a replica: frames over a stream in any pieces, records both ways, locks, folders."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from helpers.waiting import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.cluster.channel import core_slots, run_folder
from expertmesh.cluster.channel.core_slots import CoreSlots
from expertmesh.cluster.channel.framed_socket import FramedSocket, tuned
from expertmesh.cluster.channel.messages import LENGTH, decode_call, decode_reply, encode_call, encode_reply
from expertmesh.cluster.channel.run_folder import folder_of, hold, sweep
from expertmesh.experts.errors import DataLoss, FailedPrecondition, TooLarge, Unavailable
from expertmesh.experts.protocol import ExpertCall, ExpertReply, Part, PartFailure, PartialSum
from expertmesh.experts.wire import decode


def framed(limit: int = 2**31) -> tuple[FramedSocket, socket.socket]:
    ours, theirs = socket.socketpair()
    return FramedSocket(tuned(ours), limit), theirs


@given(bodies=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6), data=st.data())
@settings(deadline=None)
def test_messages_come_whole_in_whatever_pieces_they_arrive(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(LENGTH.pack(len(body)) + body for body in bodies)
    reader, writer = framed()
    found: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        writer.sendall(stream[:size])
        stream = stream[size:]
        found += [bytes(message) for message in reader.receive()]
    assert found == bodies
    writer.close()
    with pytest.raises(Unavailable):
        list(reader.receive())
    reader.close()


def test_what_the_kernel_does_not_take_is_sent_later_and_nothing_is_lost() -> None:
    sender, raw = framed()
    receiver = FramedSocket(tuned(raw))
    body = os.urandom(30_000_000)
    assert not sender.send([LENGTH.pack(len(body)), memoryview(body)[: 10**7], memoryview(body)[10**7 :]])
    assert 0 < sender.unsent < len(body) + 8
    found: list[memoryview] = []
    while not found:
        sender.flush()
        found += receiver.receive()
    assert found[0] == body
    assert sender.unsent == 0
    sender.close()
    receiver.close()


@pytest.mark.parametrize(("announced", "error"), [(0, DataLoss), (101, TooLarge), (2**64 - 1, TooLarge)])
def test_a_length_that_cannot_be_is_refused_before_memory_is_taken(announced: int, error: type[Exception]) -> None:
    reader, writer = framed(limit=100)
    writer.sendall(LENGTH.pack(announced))
    with pytest.raises(error):
        list(reader.receive())
    reader.close()
    writer.close()


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])


@st.composite
def tensors(draw: st.DrawFn, rows: int | None = None) -> Tensor:
    shape = (draw(st.integers(0, 4)) if rows is None else rows, *draw(st.lists(st.integers(0, 3), max_size=2)))
    return (torch.rand(shape) * 2).to(draw(dtypes))


@given(rows=tensors(), data=st.data())
@settings(deadline=None)
def test_calls_come_back_as_they_went(rows: Tensor, data: st.DataObject) -> None:
    index = None
    pairs = rows.shape[0]
    if rows.shape[0] and data.draw(st.booleans()):
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows.shape[0] - 1), max_size=8)), dtype=torch.int64)
        pairs = index.shape[0]
    cut = data.draw(st.integers(0, pairs))
    parts = (Part("l/a", "v1-a", 0, cut), Part("l/b", "v2-b", cut, pairs))
    sums = (PartialSum(0, 2, 0, rows.shape[0]),) if data.draw(st.booleans()) else ()
    call = ExpertCall(7, parts, rows, index, torch.rand(pairs) if sums else None, sums, data.draw(st.floats(0, 99)))
    back = decode_call(decode(b"".join(encode_call(call))[LENGTH.size :]))
    assert (back.attempt, back.parts, back.sums, back.timeout) == (7, parts, sums, call.timeout)
    for one, other in ((back.rows, rows), (back.row_index, index), (back.weights, call.weights)):
        assert (one is None) == (other is None)
        assert other is None or (one.dtype == other.dtype and torch.equal(one, other))


outputs = st.one_of(
    tensors(), st.none(), st.builds(PartFailure, st.sampled_from(["ExpertFailed"]), st.text(max_size=9))
)


@given(told=st.lists(outputs, max_size=7), sums=st.lists(outputs, max_size=3), lost=st.booleans())
@settings(deadline=None)
def test_replies_come_back_as_they_went(
    told: list[Tensor | PartFailure | None], sums: list[Tensor | PartFailure], lost: bool
) -> None:
    reply = ExpertReply("i", tuple(told), tuple(sums), torch.tensor([1, 3]) if lost else None, 0.5, 0.25)
    back = decode_reply(decode(b"".join(encode_reply(3, reply, 0.5))[LENGTH.size :]), "i")
    assert (back.queued, back.computed) == (0.5, 0.25)
    for one, other in zip((*back.outputs, *back.sums, back.lost), (*told, *sums, reply.lost), strict=True):
        if isinstance(other, Tensor):
            assert isinstance(one, Tensor)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def test_no_more_take_a_core_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_slots, "PATIENCE_SECONDS", 60.0)
    inside: list[int] = []
    most: list[int] = []

    def compute() -> None:
        gate = CoreSlots(tmp_path, 2)
        for _ in range(50):
            gate.take()
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            gate.give_back()
        gate.close()

    threads = [threading.Thread(target=compute) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 300
    assert max(most) <= 2


@pytest.mark.parametrize("ended", [0, 1])
def test_who_waits_takes_whichever_core_is_free_first(tmp_path: Path, ended: int) -> None:
    holders = [CoreSlots(tmp_path, 2) for _ in range(2)]
    assert [holder.take() for holder in holders] == [False, False]
    waiting, found = CoreSlots(tmp_path, 2), threading.Event()
    waited: list[bool] = []

    def compute() -> None:
        waited.append(waiting.take())
        found.set()

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    assert not found.wait(0.2)
    holders[ended].give_back()
    assert found.wait(10)
    thread.join(10)
    assert waited == [True]
    for gate in (*holders, waiting):
        gate.close()
        gate.close()  # a second time is harmless
        gate.give_back()


def test_who_is_frozen_at_the_head_of_the_queue_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_slots, "PATIENCE_SECONDS", 0.05)
    frozen, other = CoreSlots(tmp_path, 2), CoreSlots(tmp_path, 2)
    fcntl.flock(frozen._queue, fcntl.LOCK_EX)
    for _ in range(3):
        assert other.take()  # it computes without a core
        assert other._held is None
        other.give_back()
    fcntl.flock(frozen._queue, fcntl.LOCK_UN)
    eventually(lambda: other._turn is not None and not other._turn.given_up, 30, "the lock is let go again")
    assert not other.take()
    assert other._held is not None
    assert not frozen.take()
    for gate in (frozen, other):
        gate.close()


def test_a_long_queue_that_moves_is_waited_for_and_each_process_waits_in_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_slots, "PATIENCE_SECONDS", 0.5)
    gates = [CoreSlots(tmp_path, 1) for _ in range(12)]  # the last of which wait for more than a second
    held: list[bool] = []
    turns: set[object] = set()

    def compute(gate: CoreSlots) -> None:
        for _ in range(2):
            gate.take()
            held.append(gate._held is not None)
            turns.add(gate._turn)
            threading.Event().wait(0.1)
            gate.give_back()

    threads = [threading.Thread(target=compute, args=(gate,), daemon=True) for gate in gates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert held == [True] * 24
    assert len(turns - {None}) <= len(gates)
    for gate in gates:
        gate.close()
    eventually(lambda: not any(turn.is_alive() for turn in turns if isinstance(turn, threading.Thread)), 30, "ended")


def test_who_is_frozen_with_a_core_holds_up_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_slots, "PATIENCE_SECONDS", 0.05)
    frozen, other, third = (CoreSlots(tmp_path, 1) for _ in range(3))
    assert not frozen.take()
    for gate in (other, third, other):
        assert gate.take()
        assert gate._held is None
        gate.give_back()
    frozen.give_back()
    assert not other.take()
    assert third.take()  # nobody is frozen now, but the only core is taken
    other.give_back()
    assert not third.take()
    for gate in (frozen, other, third):
        gate.close()


@pytest.mark.parametrize("forks", ["0", "os.fork() or time.sleep(600)"])
def test_a_core_comes_back_when_its_holder_is_killed(tmp_path: Path, forks: str) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from expertmesh.cluster.channel.core_slots import CoreSlots\n"
        f"gate = CoreSlots(Path(sys.argv[1]), 1); taken = gate.take(); child = {forks}\n"
        "print(taken, child, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        taken, child = process.stdout.readline().split()
        assert taken == "False"
        gate, waited = CoreSlots(tmp_path, 1), list[bool]()
        thread = threading.Thread(target=lambda: waited.append(gate.take()), daemon=True)
        thread.start()
        threading.Timer(0.1, os.kill, (process.pid, signal.SIGKILL)).start()
        try:
            thread.join(30)
            assert waited == [True]  # it had to wait, and no longer than the other lived: what that forked lives on
            gate.close()
        finally:
            if int(child):
                os.kill(int(child), signal.SIGKILL)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_this_users_alone_and_swept_when_nobody_holds_it(temporary: Path) -> None:
    held, gone = folder_of("one"), folder_of("two")
    holder, other = hold(held), hold(gone)
    assert stat.S_IMODE(held.stat().st_mode) == 0o700
    os.close(other)
    assert sweep() == [gone]
    assert held.exists()
    os.close(holder)
    assert sweep() == [held]
    assert not list(temporary.iterdir())


def test_a_folder_that_others_may_write_to_or_a_link_is_refused(temporary: Path) -> None:
    folder_of("open").mkdir(mode=0o777)
    folder_of("open").chmod(0o777)
    (temporary / "elsewhere").mkdir(mode=0o700)
    folder_of("link").symlink_to(temporary / "elsewhere")
    for run in ("open", "link"):
        with pytest.raises(FailedPrecondition, match="must be a folder that belongs to this user"):
            hold(folder_of(run))
    assert run_folder.sweep() == []
