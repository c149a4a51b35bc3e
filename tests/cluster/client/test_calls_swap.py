"""How a client uploads and swaps, without any I/O but its own files: chunks, retries, answers, and what fails here."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.answers import answered

from expertmesh.cluster.client.calls import Calls
from expertmesh.cluster.client.retry import (
    Answer,
    Attempt,
    Beside,
    Flow,
    Pause,
    Retries,
    RetryBudget,
    RetryPolicy,
    Step,
    Work,
    drive,
)
from expertmesh.cluster.client.routers.balance import Balance, Target
from expertmesh.cluster.client.sending import SeenEpoch
from expertmesh.cluster.client.upload import STALLS
from expertmesh.cluster.rpc.documents import decode_document, encode_document
from expertmesh.cluster.rpc.swaps import SwapOutcome, UploadChunk
from expertmesh.experts import wire
from expertmesh.experts.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    RouterUnavailable,
    Unavailable,
)

V1, V2, V3 = "v1-000000000001", "v2-000000000002", "v3-000000000003"


class Server:
    """Keeps uploads as the gateway does, and notes what it was asked; `trouble` may answer in its place."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.asked: list[tuple[str, Any]] = []
        self.swaps: dict[str, dict[str, Any]] = {}
        self.trouble: Callable[[str, Any], Answer] = lambda method, asked: None

    def __call__(self, attempt: Attempt) -> Answer:
        method = attempt.method.rpartition("/")[2]
        frame = wire.decode(attempt.payload)
        assert frame.kind == method.lower()
        asked = decode_document(frame, "swap") if method == "Swap" else frame.meta
        self.asked.append((method, asked))
        answer = self.trouble(method, asked)
        return getattr(self, method.lower())(asked, frame) if answer is None else answer

    def upload(self, meta: dict[str, Any], frame: wire.Frame) -> bytes:
        data = frame.tensors["data"].data
        UploadChunk(**meta).check(len(data))
        there = self.files.setdefault(meta["upload_id"], bytearray())
        if meta["offset"] == len(there):
            there += data
        done = bool(meta["last"]) and len(there) == meta["total"]
        if done:
            assert hashlib.sha256(there).hexdigest() == meta["sha256"]
        return encode_document("uploaded", {"next": len(there), "done": done})

    def swap(self, asked: dict[str, Any], frame: wire.Frame) -> bytes:
        self.swaps.setdefault(asked["swap_id"], asked)
        after = dict.fromkeys(asked["changes"], V3)
        outcome = SwapOutcome(swap_id=asked["swap_id"], epoch=9, before={}, after=after, cluster="here")
        return encode_document("swap", outcome.to_document())


class World:
    """A client of the server, whose clock moves with its pauses."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.server = Server()
        numbers: Iterator[int] = iter(range(1_000_000))
        retries = Retries(policy=RetryPolicy(), budget=RetryBudget(), clock=lambda: self.now, jitter=lambda: 0.0)
        self.calls = Calls(token="t", timeout=10.0, retries=retries, new_id=lambda: f"id-{next(numbers)}", **options)

    def run(self, flow: Flow[Any]) -> Any:
        return drive(flow, self.perform)

    def perform(self, step: Step) -> Answer:
        if isinstance(step, Work):
            return step.action()
        if isinstance(step, Pause):
            self.now += step.seconds
            return None
        if isinstance(step, Beside):
            return None
        assert isinstance(step, Attempt)
        return answered(step, self.server)

    def methods(self) -> list[str]:
        return [method for method, _ in self.server.asked]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "e.safetensors"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_a_file_goes_in_chunks_and_then_the_swap_names_it(file: Path) -> None:
    world, told = World(max_message_bytes=4096 + 4000), []
    outcome = world.run(
        world.calls.swap(
            {"l/a": file},
            expect={"l/a": V1},
            max_drift=0.5,
            swap_id="mine",
            timeout=7.0,
            progress=lambda *s: told.append(s),
        )
    )
    assert world.methods() == ["Upload", "Upload", "Upload", "Swap"]
    assert told == [("l/a", 4000, 10240), ("l/a", 8000, 10240), ("l/a", 10240, 10240)]
    ((upload_id, data),) = world.server.files.items()
    assert uuid.UUID(upload_id).hex == upload_id
    assert bytes(data) == file.read_bytes()
    assert world.server.swaps["mine"] == {
        "swap_id": "mine", "expect": {"l/a": V1}, "mode": "double", "timeout": 7.0, "dry_run": False, "adopts": {},
        "policy": {"allow_norm": False, "max_drift": 0.5},
        "changes": {"l/a": {"upload": upload_id, "sha256": hashlib.sha256(data).hexdigest()}},
    }  # fmt: skip
    assert (outcome.epoch, outcome.after, outcome.committed) == (9, {"l/a": V3}, True)
    assert world.calls.seen_epoch.options() == {"min_epoch": 9, "cluster": "here"}


def test_lost_answers_are_asked_for_again_and_the_swap_happens_once(file: Path) -> None:
    world = World(max_message_bytes=4096 + 4000)
    lost: list[str] = []

    def lose_every_other(method: str, asked: Any) -> Answer:
        """Carry it out, and lose the answer."""
        key = f"{method} {asked.get('offset')}"
        if key in lost:
            return None
        lost.append(key)
        frame = wire.Frame(method.lower(), asked, {})
        if method == "Swap":
            world.server.swap(asked, frame)
        return Unavailable("the connection broke")

    world.server.trouble = lose_every_other
    world.run(world.calls.swap({"l/a": file}))
    assert world.methods() == [name for name in ("Upload", "Upload", "Upload", "Swap") for _ in range(2)]
    assert len(world.server.swaps) == 1


def test_a_server_that_lost_the_upload_is_sent_it_again(file: Path) -> None:
    world = World(max_message_bytes=4096 + 4000)
    dropped: list[int] = []

    def drop_once(method: str, asked: Any) -> Answer:
        if asked.get("offset") == 8000 and not dropped:
            dropped.append(8000)
            world.server.files.clear()
        return None

    world.server.trouble = drop_once
    world.run(world.calls.swap({"l/a": file}))
    assert [asked["offset"] for method, asked in world.server.asked if method == "Upload"] == [
        0,
        4000,
        8000,
        0,
        4000,
        8000,
    ]
    assert bytes(next(iter(world.server.files.values()))) == file.read_bytes()


def test_an_upload_that_does_not_get_on_is_given_up(file: Path) -> None:
    world = World()
    world.server.trouble = lambda method, asked: encode_document("uploaded", {"next": 0, "done": False})
    with pytest.raises(Unavailable, match=r"e\.safetensors makes no progress"):
        world.run(world.calls.swap({"l/a": file}))
    assert len(world.server.asked) == STALLS + 1


def test_a_controller_that_restarts_is_waited_for_and_an_open_outcome_is_said(file: Path) -> None:
    world = World()
    world.server.trouble = lambda method, asked: (
        Unavailable("restarting") if method == "Swap" and world.now < 8 else None
    )
    assert world.run(world.calls.swap({"l/a": file}, timeout=5.0)).committed
    assert 8 <= world.now <= 20
    world.server.trouble = lambda method, asked: Unavailable("restarting") if method == "Swap" else None
    with pytest.raises(Unavailable, match=r"restarting; the outcome of swap x-1 is unknown: .*swap_id='x-1'"):
        world.run(world.calls.swap({"l/a": file}, timeout=5.0, swap_id="x-1"))
    world.server.trouble = lambda method, asked: DeadlineExceeded("no answer") if method == "Swap" else None
    with pytest.raises(DeadlineExceeded, match=r"outcome of swap .* is unknown"):
        world.run(world.calls.swap({"l/a": file}, timeout=5.0))


def test_an_upload_and_its_swap_stay_with_one_router_while_it_answers(file: Path) -> None:
    targets = [Target(address=f"{name}:1", connect_to=f"{name}:1") for name in "abc"]
    routers = Balance(targets, lambda: 0.0, shuffle=lambda targets: None)
    world = World(max_message_bytes=4096 + 4000, routers=routers)
    taken: list[str] = []
    lost: list[str] = []

    def serve(attempt: Attempt) -> Answer:
        taken.append(attempt.route.tried[-1].address)
        return RouterUnavailable("lost") if taken[-1] in lost else server(attempt)

    server, world.server = world.server, serve  # type: ignore[assignment]
    world.run(world.calls.swap({"l/a": file}))
    assert taken == ["a:1"] * 4
    taken.clear()
    swapping = world.calls.swap({"l/a": file}, progress=lambda *told: lost.append(taken[-1]) if not lost else None)
    world.run(swapping)
    assert taken == ["b:1", "b:1", "c:1", "c:1", "c:1"]  # two chunks, one of them lost, and the rest elsewhere
    assert bytes(list(server.files.values())[-1]) == file.read_bytes()


def test_a_refusal_names_the_file_and_is_not_asked_for_again(file: Path) -> None:
    world = World()

    def refuse(method: str, asked: Any) -> Answer:
        return DataLoss(f"weights file '{asked['changes']['l/a']['upload']}': truncated") if method == "Swap" else None

    world.server.trouble = refuse
    with pytest.raises(DataLoss, match=r"weights file 'e\.safetensors': truncated"):
        world.run(world.calls.swap({"l/a": file}))
    world.server.trouble = lambda method, asked: Aborted("lost") if method == "Swap" else None
    with pytest.raises(Aborted):
        world.run(world.calls.swap({"l/a": file}))
    assert world.methods() == ["Upload", "Swap"] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drift": math.nan}, "cannot be sent"),
        ({"max_drift": object()}, "cannot be sent"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": 1e9}, "timeout"),
        ({"timeout": "1"}, "field timeout"),
        ({"expect": {"l/a": 1}}, "field expect"),
        ({"swap_id": 7}, "field swap_id"),
        ({"dry_run": 1}, "field dry_run"),
        ({"adopts": {"l/a": "x"}}, "adopts: l/a must be changed, by a digest"),
        ({"changes": {}}, "say what to swap"),
        ({"changes": "l/a"}, "say what to swap"),
        ({"changes": {"l/a": None}}, "pass the path of a safetensors file"),
        ({"changes": {"l/a": {}}}, "l/a: give an upload, a version or a factory"),
        ({"changes": {"l/a": {"kwargs": {}, "args": [1]}}}, "l/a: give an upload, a version or a factory"),
        ({"changes": {"l/a": {"version": V1, "factory": "a:b"}}}, "leave upload and factory out"),
        ({"changes": {"l/a": {"factory": "a:b", "args": {}}}}, "l/a: field args"),
        ({"changes": {"l/a": {"colour": "red"}}}, "l/a: unknown field 'colour'"),
    ],
)
def test_what_cannot_be_meant_fails_here(file: Path, options: dict[str, Any], said: str) -> None:
    world = World()
    with pytest.raises(InvalidRequest, match=said):
        world.run(world.calls.swap(**({"changes": {"l/a": file}} | options)))
    assert world.server.asked == []


def test_another_factory_with_weights_of_its_own(file: Path) -> None:
    world = World()
    world.run(
        world.calls.swap({"l/a": {"factory": "mine:Expert", "kwargs": {"width": 4}, "weights": file}}, swap_id="f")
    )
    (change,) = world.server.swaps["f"]["changes"].values()
    assert (change["factory"], change["kwargs"], len(change["upload"])) == ("mine:Expert", {"width": 4}, 32)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    world = World()
    with pytest.raises(NotFound, match=r"cannot read .*none"):
        world.run(world.calls.swap({"l/a": tmp_path / "none"}))
    assert world.server.asked == []


def told(versions: list[dict[str, Any]]) -> Callable[[str, Any], Answer]:
    return lambda method, asked: encode_document("history", {"versions": versions}) if method == "History" else None


def test_a_rollback_asks_for_the_version_before_and_expects_what_it_saw() -> None:
    world = World()
    world.server.trouble = told([{"version": V1}, {"version": V2, "current": True}, {"version": V3}])
    world.run(world.calls.rollback("l/a", "l/b", to={"l/b": V3}, swap_id="r"))
    asked = world.server.swaps["r"]
    assert asked["changes"] == {"l/a": {"version": V1}, "l/b": {"version": V3}}
    assert asked["expect"] == {"l/a": V2, "l/b": V2}
    world.server.trouble = told([{"version": V1, "current": True}])
    with pytest.raises(FailedPrecondition, match=f"no version before {V1}"):
        world.run(world.calls.rollback("l/a"))
    world.server.trouble = told([{"version": V1}])
    with pytest.raises(FailedPrecondition, match="no current version"):
        world.run(world.calls.rollback("l/a"))


@pytest.mark.parametrize("document", [{}, {"versions": {}}, {"versions": ["v1"]}])
def test_a_history_that_is_none_is_lost_data(document: dict[str, Any]) -> None:
    world = World()
    world.server.trouble = lambda method, asked: encode_document("history", document)
    with pytest.raises(DataLoss):
        world.run(world.calls.history("l/a"))


def test_an_outcome_survives_its_document_with_infinite_drift_too() -> None:
    drift = {"a": 0.5, "b": None, "c": math.inf}
    outcome = SwapOutcome(
        swap_id="s", epoch=2, before={"a": V1}, after={"a": V2}, drift=drift, pending=["r"], unmeasured={"b": "no"}
    )
    frame = wire.decode(encode_document("swap", outcome.to_document()))
    assert SwapOutcome.from_document(decode_document(frame, "swap")) == outcome
    for wrong in (
        {},
        {**asdict(outcome), "epoch": "2"},
        {**asdict(outcome), "drift": 5},
        {**asdict(outcome), "more": 1},
    ):
        with pytest.raises(DataLoss):
            SwapOutcome.from_document(wrong)


def test_what_was_seen_is_of_one_cluster_and_never_goes_back() -> None:
    seen = SeenEpoch()
    assert seen.options() == {"min_epoch": 0, "cluster": ""}
    for cluster, epoch, highest in [("a", 3, 3), ("a", 2, 3), ("", 9, 3), ("a", 5, 5), ("b", 1, 1), ("b", 2, 2)]:
        seen.note(cluster, epoch)
        assert seen.options()["min_epoch"] == highest
    assert seen.options()["cluster"] == "b"
