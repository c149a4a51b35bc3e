"""The gateway's part of swaps, without gRPC: what is asked is checked in full before anybody is asked to do it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import run_async

from expertmesh.cluster.control.messages import SwapRequest, SwapResult
from expertmesh.cluster.gateway.authorise import Caller
from expertmesh.cluster.gateway.changes import ChangeMethods
from expertmesh.cluster.gateway.records import MAX_DOCUMENT_BYTES
from expertmesh.cluster.gateway.swaps import SwapMethods, swap_request
from expertmesh.cluster.rpc.documents import decode_document, encode_document
from expertmesh.cluster.rpc.methods import Role
from expertmesh.cluster.rpc.swaps import MAX_CHANGES, SwapAsked
from expertmesh.cluster.state.uploads import UploadLimits, Uploads
from expertmesh.cluster.state.version_folders import VersionStore
from expertmesh.experts import wire
from expertmesh.experts.errors import (
    Aborted,
    DataLoss,
    ExpertMeshError,
    InvalidRequest,
    PermissionDenied,
    RouterUnavailable,
    TooLarge,
    Unavailable,
)
from expertmesh.experts.protocol import from_mapping
from expertmesh.router.epochs.epochs import Epoch, Epochs
from expertmesh.router.epochs.leases import Leases

V1, V2 = "v1-000000000001", "v2-000000000002"
UPLOAD, SHA256 = "0123456789abcdef" * 2, hashlib.sha256(b"weights").hexdigest()
CHANGE = {"upload": UPLOAD, "sha256": SHA256}
SWAP: dict[str, Any] = {"swap_id": "s-1", "changes": {"l/a": CHANGE}}


async def called(function: Any, *arguments: Any) -> Any:
    """As the router's thread does, without one."""
    return function(*arguments)


class Reconciler:
    """A controller that notes what it is asked, and answers as told once `go` is set."""

    def __init__(self) -> None:
        self.asked: list[SwapRequest] = []
        self.error: ExpertMeshError | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.ended = 0

    async def swap(self, request: SwapRequest) -> SwapResult:
        self.asked.append(request)
        await self.go.wait()
        self.ended += 1
        if self.error is not None:
            raise self.error
        drift = {"l/a": float("inf")}
        return SwapResult(swap_id=request.swap_id, epoch=2, before={"l/a": V1}, after={"l/a": V2}, drift=drift)

    async def progress(self, swap_id: str) -> dict[str, Any]:
        return {"swap_id": swap_id, "phase": "staging"}

    async def history(self, id: str) -> list[dict[str, Any]]:
        return [{"version": V1}]

    async def declared(self) -> dict[str, Any]:
        return {"layers": {"l": {}}}

    async def recall(self, epoch: int, ttl: float) -> None:
        raise AssertionError


class World:
    """The swap methods, with a stand-in for the controller."""

    def __init__(self, folder: Path) -> None:
        self.control = Reconciler()
        self.store = VersionStore(folder)
        self.epochs = Epochs()
        self.epochs.adopt(Epoch(1, {"l/a": V1}, {}, "here"))
        self.pins = Leases(self.epochs, lambda: 0.0)
        self.serving = False
        self.methods = SwapMethods(
            self.control,
            Uploads(self.store, UploadLimits(upload_rate=2)),
            self.epochs,
            self.pins,
            called,
            ("mine:Expert",),
            busy=lambda: self.serving,
        )

        self.changes = ChangeMethods(self.control, None, self.methods.drop_uploads)  # type: ignore[arg-type]

    async def ask(self, method: str, frame: bytes, role: Role = Role.OPERATOR) -> dict[str, Any]:
        handlers = {**self.methods.handlers(), **self.changes.handlers()}
        answer = wire.decode(await handlers[method](wire.decode(frame), Caller(role)))
        return decode_document(answer, answer.kind)

    async def swap(self, role: Role = Role.OPERATOR, **changes: Any) -> dict[str, Any]:
        return await self.ask("Swap", encode_document("swap", SWAP | changes), role)

    async def upload(self, data: bytes = b"weights", **changes: Any) -> dict[str, Any]:
        meta = {"upload_id": UPLOAD, "offset": 0, "total": len(data), "sha256": SHA256, "last": True} | changes
        tensor = wire.WireTensor("uint8", (len(data),), data)
        return await self.ask("Upload", wire.encode("upload", meta, {"data": tensor}))

    def is_there(self) -> bool:
        return self.store.upload_path(UPLOAD).exists()


def run(tmp_path: Path, main: Any) -> None:
    async def whole() -> None:
        world = World(tmp_path / "state")
        try:
            await main(world)
        finally:
            world.methods.close()

    work: Coroutine[Any, Any, None] = whole()
    run_async(work)


def test_what_a_swap_adopts_is_one_of_its_changes_and_a_digest(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        await world.swap(adopts={"l/a": "ab" * 32})
        assert world.control.asked[0].adopts == {"l/a": "ab" * 32}
        for wrong in ({"l/b": "ab" * 32}, {"l/a": "AB" * 32}, {"l/a": "x"}):
            with pytest.raises(InvalidRequest, match=r"adopts: l/. must be changed, by a digest"):
                await world.swap(adopts=wrong)
        with pytest.raises(InvalidRequest):
            await world.swap(adopts={"l/a": 3})

    run(tmp_path, main)


def test_a_swap_reaches_the_controller_as_it_was_asked_for(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        assert await world.upload() == {"next": 7, "done": True}
        asked = {"policy": {"max_drift": 0.5, "probe_rows": 4}, "mode": "staged_cpu", "timeout": 5, "dry_run": True}
        told = await world.swap(expect={"l/b": V2}, **asked)
        assert (told["epoch"], told["drift"], told["cluster"]) == (2, {"l/a": "inf"}, "here")
        (request,) = world.control.asked
        assert (request.swap_id, request.expect, request.mode, request.timeout) == (
            "s-1",
            {"l/b": V2},
            "staged_cpu",
            5.0,
        )
        assert (request.policy.max_drift, request.policy.probe_rows, request.policy.max_norm_ratio) == (0.5, 4, 1000.0)
        assert (request.dry_run, request.note) == (True, "")
        assert (request.changes["l/a"].upload, request.changes["l/a"].expert) == (UPLOAD, None)
        assert not world.is_there()  # a rehearsal leaves nothing

    run(tmp_path, main)


@pytest.mark.parametrize("error", [Aborted("lost a race"), DataLoss("truncated"), Unavailable("restarting")])
def test_what_a_refused_swap_has_uploaded_is_dropped_unless_it_may_be_asked_for_again(
    tmp_path: Path, error: ExpertMeshError
) -> None:
    async def main(world: World) -> None:
        await world.upload()
        world.control.error = error
        with pytest.raises(type(error)):
            await world.swap()
        assert world.is_there() == isinstance(error, Unavailable)

    run(tmp_path, main)


def test_a_router_that_is_not_where_the_state_is_sends_uploads_to_another(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        elsewhere = SwapMethods(world.control, None, world.epochs, world.pins, called)
        world.methods, here = elsewhere, world.methods
        with pytest.raises(RouterUnavailable, match="through another one"):
            await world.upload()
        world.methods = here
        await world.upload()
        world.methods = elsewhere
        assert (await world.swap())["epoch"] == 2  # what is uploaded may be swapped in through any router
        elsewhere.close()
        world.methods = here

    run(tmp_path, main)


def test_an_upload_leaves_time_to_those_who_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def main(world: World) -> None:
        monkeypatch.setattr("expertmesh.cluster.gateway.swaps.asyncio.sleep", sleep)
        piece = {"total": 7, "last": False}
        assert await world.upload(b"wei", **piece) == {"next": 3, "done": False}
        assert slept == []
        world.serving = True
        assert await world.upload(b"gh", **piece, offset=3) == {"next": 5, "done": False}
        assert slept == [1.0]  # two bytes, at two bytes a second
        assert await world.upload(b"ts", total=7, offset=5) == {"next": 7, "done": True}
        assert slept == [1.0, 1.0]  # another file may come after it

    run(tmp_path, main)


def test_a_swap_goes_on_when_its_caller_goes(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        world.control.go.clear()
        world.control.error = DataLoss("truncated")
        asking = asyncio.ensure_future(world.swap())
        while not world.control.asked:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert world.control.ended == 0
        world.control.go.set()
        while not world.control.ended:
            await asyncio.sleep(0)

    run(tmp_path, main)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no changes": ({"changes": {}}, "1 to 4096 ids"),
    "too many changes": ({"changes": {f"l/e{i}": CHANGE for i in range(MAX_CHANGES + 1)}}, "1 to 4096 ids"),
    "a list of changes": ({"changes": []}, "field changes"),
    "a change that is a text": ({"changes": {"l/a": UPLOAD}}, "field changes"),
    "an empty change": ({"changes": {"l/a": {}}}, "l/a: give an upload, a version or a factory"),
    "an upload without a sum": ({"changes": {"l/a": {"upload": UPLOAD}}}, "l/a: upload and sha256 belong together"),
    "a sum without an upload": ({"changes": {"l/a": {"sha256": SHA256}}}, "l/a: upload and sha256 belong together"),
    "an upload elsewhere": ({"changes": {"l/a": CHANGE | {"upload": "../../etc/passwd"}}}, "32 hex digits"),
    "a sum that is none": ({"changes": {"l/a": CHANGE | {"sha256": "abc"}}}, "64 lower-case hex digits"),
    "two things at once": ({"changes": {"l/a": CHANGE | {"version": V1}}}, "leave upload and factory out"),
    "a version that is none": ({"changes": {"l/a": {"version": "7"}}}, "is not a version"),
    "arguments of nothing": ({"changes": {"l/a": CHANGE | {"args": [1]}}}, "args and kwargs need a factory"),
    "a field that is none": ({"changes": {"l/a": CHANGE | {"path": "/etc"}}}, "unknown field 'path'"),
    "an id that is none": ({"changes": {"a": CHANGE}}, "is not the id"),
    "an id elsewhere": ({"changes": {"../a": CHANGE}}, "is not the id"),
    "an expected version that is none": ({"expect": {"l/a": "7"}}, "is not a version"),
    "an expected id that is none": ({"expect": {"a": V1}}, "is not the id"),
    "a swap id that is none": ({"swap_id": "a b"}, "swap id"),
    "a swap id of another kind": ({"swap_id": 7}, "field swap_id"),
    "a mode that is none": ({"mode": "triple"}, "mode must be one of double, staged_cpu"),
    "no time": ({"timeout": 0}, "timeout"),
    "too much time": ({"timeout": 1e9}, "timeout"),
    "a bound that is none": ({"policy": {"max_norm_ratio": 0.5}}, "max_norm_ratio"),
    "a bound of another kind": ({"policy": {"probe_rows": "8"}}, "field probe_rows"),
    "a policy that is none": ({"policy": {"trust": True}}, "unknown field 'trust'"),
    "a note of our own": ({"note": "declared"}, "unknown field 'note'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_and_the_controller_never_hears_of_it(tmp_path: Path, case: str) -> None:
    changes, said = WRONG[case]

    async def main(world: World) -> None:
        with pytest.raises(InvalidRequest, match=said):
            await world.swap(**changes)
        assert world.control.asked == []

    run(tmp_path, main)


def raw(text: bytes, kind: str = "swap", meta: dict[str, Any] | None = None) -> bytes:
    return wire.encode(kind, meta or {}, {"json": wire.WireTensor("uint8", (len(text),), text)})


DOCUMENTS: dict[str, tuple[bytes, type[ExpertMeshError]]] = {
    "no JSON": (raw(b"{"), InvalidRequest),
    "a list": (raw(b"[]"), InvalidRequest),
    "NaN": (raw(b'{"timeout": NaN}'), InvalidRequest),
    "a key twice": (raw(b'{"swap_id": "a", "swap_id": "b", "changes": {}}'), InvalidRequest),
    "depth": (raw(b"[" * 100_000), InvalidRequest),
    "bytes that are no text": (raw(b"\xff\xfe"), InvalidRequest),
    "too many bytes": (raw(b" " * (MAX_DOCUMENT_BYTES + 1)), TooLarge),
    "another kind": (raw(json.dumps(SWAP).encode(), kind="status"), InvalidRequest),
    "something in the header": (raw(json.dumps(SWAP).encode(), meta={"a": 1}), InvalidRequest),
    "no document": (wire.encode("swap", {}), InvalidRequest),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_document_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    frame, kind = DOCUMENTS[case]

    async def main(world: World) -> None:
        with pytest.raises(kind):
            await world.ask("Swap", frame)
        assert world.control.asked == []

    run(tmp_path, main)


@pytest.mark.parametrize(
    ("factory", "role", "allowed"),
    [
        ("mine:Expert", Role.ADMIN, True),
        ("mine:Expert", Role.OPERATOR, False),
        ("mine:Expert.other", Role.ADMIN, False),
        ("os:system", Role.ADMIN, False),
        ("os:system", Role.OPERATOR, False),
        ("", Role.ADMIN, False),
    ],
)
def test_a_factory_is_for_admins_and_must_be_allowed(factory: str, role: Role, allowed: bool) -> None:
    change = {"factory": factory, "args": [1], "kwargs": {"by": 2.0}}
    asked = from_mapping(SwapAsked, {"swap_id": "s", "changes": {"l/a": change}})
    if allowed:
        expert = swap_request(asked, role, ("mine:Expert",)).changes["l/a"].expert
        assert expert is not None
        assert (expert.factory, expert.args, expert.kwargs) == ("mine:Expert", (1,), {"by": 2.0})
    else:
        with pytest.raises(PermissionDenied, match="l/a: "):
            swap_request(asked, role, ("mine:Expert",))


def test_chunks_that_are_none(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        for tensors in (
            {},
            {"data": wire.WireTensor("int64", (1,), bytes(8))},
            {"data": wire.WireTensor("uint8", (1, 7), b"weights")},
            {"data": wire.WireTensor("uint8", (7,), b"weights"), "more": wire.WireTensor("uint8", (0,), b"")},
        ):
            meta = {"upload_id": UPLOAD, "offset": 0, "total": 7, "sha256": SHA256, "last": True}
            with pytest.raises(InvalidRequest):
                await world.ask("Upload", wire.encode("upload", meta, tensors))
        for changes in ({"upload_id": "gate-1"}, {"total": 6}, {"offset": True}, {"more": 1}):
            with pytest.raises(InvalidRequest):
                await world.upload(**changes)
        with pytest.raises(DataLoss):
            await world.upload(b"another")
        assert not world.is_there()

    run(tmp_path, main)


def test_progress_history_and_leases(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        progress = await world.ask("SwapProgress", wire.encode("swapprogress", {"swap_id": "s"}), Role.READER)
        assert progress == {"swap_id": "s", "phase": "staging"}
        history = await world.ask("History", wire.encode("history", {"id": "l/a"}), Role.READER)
        assert history == {"id": "l/a", "versions": [{"version": V1}]}
        declared = await world.ask("Declared", wire.encode("declared", {}), Role.OPERATOR)
        assert declared == {"layers": {"l": {}}}
        lease = await world.ask("Pin", wire.encode("pin", {"ttl": 5}), Role.READER)
        assert (lease["epoch"], lease["ttl"], lease["cluster"]) == (1, 5, "here")
        assert world.epochs.pins() == {1: 1}
        given_back = wire.encode("unpin", {"pin": lease["pin"]})
        assert await world.ask("Unpin", given_back, Role.READER) == {"was_held": True}
        assert await world.ask("Unpin", given_back, Role.READER) == {"was_held": False}
        assert world.epochs.pins() == {}
        for method, meta in [
            ("SwapProgress", {}), ("SwapProgress", {"swap_id": "a b"}), ("History", {"id": "a"}), ("History", {}),
            ("Pin", {"ttl": 0}), ("Pin", {"ttl": "1"}), ("Pin", {"more": 1}), ("Unpin", {}), ("Unpin", {"pin": None}),
        ]:  # fmt: skip
            with pytest.raises(InvalidRequest):
                await world.ask(method, wire.encode(method.lower(), meta))
            with pytest.raises(InvalidRequest, match="expected a frame of kind"):
                await world.ask(method, wire.encode("call", meta))

    run(tmp_path, main)
