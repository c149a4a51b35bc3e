"""The clients' calls without any I/O: what a request carries, what a reply brings, which mistakes fail here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers.answers import answered

from expertmesh.cluster.client.calls import Calls
from expertmesh.cluster.client.retry import Answer, Attempt, Flow, Pause, Retries, RetryBudget, RetryPolicy, Step, drive
from expertmesh.cluster.rpc.documents import decode_document, encode_document
from expertmesh.cluster.rpc.methods import METHODS, Role
from expertmesh.experts import wire
from expertmesh.experts.errors import DataLoss, InvalidRequest, NotFound, TooLarge, Unavailable
from expertmesh.experts.wire import WireTensor

X = np.arange(6, dtype=np.float32).reshape(3, 2)


class World:
    """A cluster that answers as told, and a record of what it was sent."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        numbers: Iterator[int] = iter(range(1_000_000))
        retries = Retries(policy=RetryPolicy(), budget=RetryBudget(), clock=lambda: 0.0, jitter=lambda: 0.0)
        self.calls = Calls(token="secret-token", timeout=10.0, retries=retries, new_id=lambda: f"id-{next(numbers)}")

    def run(self, flow: Flow[Any], server: Callable[[Attempt], Answer]) -> Any:
        """Drive a flow to its end; `server` answers each attempt."""

        def perform(step: Step) -> Answer:
            if isinstance(step, Pause):
                return None
            assert isinstance(step, Attempt)
            self.attempts.append(step)
            return answered(step, server)

        return drive(flow, perform)


def reply_frame(output: Any, *, kind: str = "reply", rename: str | None = None, **more: Any) -> bytes:
    """What a server says: `more` holds tensors and fields of the summary."""
    tensors = {"output": WireTensor.from_numpy(output, rename)}
    tensors |= {name: WireTensor.from_numpy(value) for name, value in more.items() if isinstance(value, np.ndarray)}
    meta = {"request_id": "r", "epoch": 3, "versions": {"news/e0": "v1-3fa1c2d40b9e"}}
    return wire.encode(kind, meta | {k: v for k, v in more.items() if not isinstance(v, np.ndarray)}, tensors)


def echo(attempt: Attempt) -> bytes:
    """Answer with the very rows."""
    frame = wire.decode(attempt.payload)
    meta = {"request_id": frame.meta["request_id"], "epoch": 1, "versions": {}}
    return wire.encode("reply", meta, {"output": frame.tensors["x"]})


def down(_: Attempt) -> Answer:
    return Unavailable("down")


def test_a_request_carries_what_was_set_and_nothing_else() -> None:
    world = World()
    world.run(world.calls.call("news", X), echo)
    (attempt,) = world.attempts
    frame = wire.decode(attempt.payload)
    assert (attempt.method, attempt.timeout) == ("/expertmesh.v1.Mesh/Call", 10.0)
    assert dict(attempt.metadata) == {"authorization": "Bearer secret-token", "x-request-id": "id-0",
                                      "x-expertmesh-layer": "news"}  # fmt: skip
    assert (frame.kind, frame.meta, list(frame.tensors)) == ("call", {"layer": "news", "request_id": "id-0"}, ["x"])


def test_every_option_reaches_the_frame() -> None:
    world = World()
    options: dict[str, Any] = {
        "top_k": 2, "allow": ["a/e0"], "deny": ["a/e1"], "on_missing": "residual", "max_lost_mass": 0.5,
        "return_routing": True, "request_id": "mine",
    }  # fmt: skip
    index, weights = np.zeros((3, 2), np.int64), np.ones((3, 2), np.float32)
    flow = world.calls.call(
        "a", X, gate_input=X + 1, top_k_index=index, top_k_weights=weights, timeout=2.5, raw=True, **options
    )
    world.run(flow, echo)
    frame = wire.decode(world.attempts[0].payload)
    assert frame.meta == {"layer": "a", **options}
    assert list(frame.tensors) == ["x", "gate_input", "top_k_index", "top_k_weights"]
    np.testing.assert_array_equal(frame.tensors["gate_input"].to_numpy(), X + 1)
    assert world.attempts[0].timeout == 2.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"x": None}, "x must be an array"),
        ({"x": 1.0}, "first dimension"),
        ({"x": "rows"}, "x has dtype str"),
        ({"x": [object()]}, "x has dtype object"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x must be an array of numbers"),
        ({"x": np.zeros(2, np.complex64)}, "x has dtype complex64"),
        ({"x": np.zeros(2, np.uint16)}, "x has dtype uint16"),
        ({"gate_input": "rows"}, "gate_input has dtype"),
        ({"layer": 3}, "field layer"),
        ({"layer": "\ud800"}, "cannot be sent"),
        ({"top_k": "2"}, "field top_k"),
        ({"top_k": 2**70}, "top_k must be a number of at most 64 bits"),
        ({"allow": "news/e0"}, r"\['news/e0'\]"),
        ({"deny": [1]}, "field deny"),
        ({"max_lost_mass": float("nan")}, "field max_lost_mass"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "two words"}, "request_id"),
        ({"request_id": "line\nbreak"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": 7}, "request_id"),
    ],
)
def test_a_bad_request_fails_here_and_says_what_is_wrong(options: dict[str, Any], said: str) -> None:
    world = World()
    with pytest.raises(InvalidRequest, match=said):
        world.run(world.calls.call(**({"layer": "news", "x": X} | options)), echo)
    assert world.attempts == []


@pytest.mark.parametrize(
    "settings_of_client",
    [
        {"token": ""},
        {"token": "a b"},
        {"token": "ü"},
        {"timeout": 0.0},
        {"max_message_bytes": 0},
        {"max_message_bytes": 1.5},
        {"max_request_bytes": 0},
        {"max_request_bytes": 2.0},
        {"payload_dtype": "int8"},
        {"payload_dtype": 16},
    ],
)
def test_a_bad_setting_of_the_client_is_refused_without_showing_the_token(settings_of_client: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Calls(**({"token": "t"} | settings_of_client))
    assert "ü" not in str(caught.value)


def test_a_request_above_the_limit_names_the_setting() -> None:
    calls = Calls(token="t", max_message_bytes=1024, max_request_bytes=4096)
    with pytest.raises(TooLarge, match="max_message_bytes"):
        World().run(calls.call("news", np.zeros(1024, np.uint8), stream=False), echo)
    with pytest.raises(TooLarge, match="max_request_bytes"):
        World().run(calls.call("news", np.zeros(4096, np.uint8)), echo)


def test_the_token_is_in_no_repr() -> None:
    world = World()
    world.run(world.calls.call("news", X), echo)
    assert "secret-token" not in repr(world.calls) + repr(world.attempts)


def test_a_reply_brings_everything() -> None:
    routing: dict[str, Any] = {"indices": np.ones((3, 2), np.int64), "weights": np.full((3, 2), 0.5, np.float32)}
    lost = np.array([0, 0.25, 0], np.float32)
    frame = reply_frame(X, degraded=True, missing=["news/e1"], max_lost_mass=0.25, dropped=4, lost_mass=lost, **routing)
    world = World()
    reply = world.run(world.calls.call("news", X, return_routing=True), lambda _: frame)
    np.testing.assert_array_equal(reply.output, X)
    np.testing.assert_array_equal(reply.lost_mass, lost)
    np.testing.assert_array_equal(reply.indices, routing["indices"])
    np.testing.assert_array_equal(reply.weights, routing["weights"])
    assert (reply.epoch, reply.versions, reply.degraded) == (3, {"news/e0": "v1-3fa1c2d40b9e"}, True)
    assert (reply.missing, reply.max_lost_mass, reply.request_id, reply.dropped) == (["news/e1"], 0.25, "r", 4)
    for array in (reply.output, reply.lost_mass, reply.indices, reply.weights):
        assert array.flags.writeable
        assert array.flags.owndata or array.base.flags.owndata


def test_what_a_reply_leaves_out_is_nothing_lost() -> None:
    world = World()
    reply = world.run(world.calls.call("news", X), echo)
    assert reply.lost_mass.dtype == np.float32
    np.testing.assert_array_equal(reply.lost_mass, np.zeros(3))
    assert reply.indices is None
    assert reply.weights is None


def test_repr_of_a_reply_is_short() -> None:
    world = World()
    versions = {f"news/e{n}": "v1-3fa1c2d40b9e" for n in range(500)}
    frame = reply_frame(np.zeros((100_000, 4), np.float32), versions=versions, degraded=True, missing=list(versions))
    reply = world.run(world.calls.call("news", np.zeros((100_000, 1), np.int8)), lambda _: frame)
    assert len(repr(reply)) < 400
    assert "ndarray[100000, 4] float32" in repr(reply)
    assert f"{{{len(reply.versions)} versions}}" in repr(reply)


def test_bfloat16_is_widened_unless_raw() -> None:
    bits = np.array([[0x3F80], [0x4000], [0xC000]], np.uint16)
    world = World()
    widened = world.run(world.calls.forward("news", X), lambda _: reply_frame(bits, rename="bfloat16"))
    assert widened.dtype == np.float32
    assert widened.tolist() == [[1.0], [2.0], [-2.0]]
    widened[0] = 5
    raw = world.run(world.calls.forward("news", X, raw=True), lambda _: reply_frame(bits, rename="bfloat16"))
    np.testing.assert_array_equal(raw, bits)
    raw[0] = 5
    back = world.run(world.calls.forward("news", bits, raw=True), echo)
    assert wire.decode(world.attempts[-1].payload).tensors["x"].dtype == "bfloat16"
    np.testing.assert_array_equal(back, bits)


BAD_REPLIES: dict[str, bytes] = {
    "no frame": b"<html>",
    "nothing": b"",
    "another kind": reply_frame(X, kind="status"),
    "another count of rows": reply_frame(X[:2]),
    "a number": reply_frame(np.float32(1)[()].reshape(())),
    "a field too many": reply_frame(X, surprise=1),
    "a field of the wrong type": reply_frame(X, epoch="3"),
    "lost mass of other rows": reply_frame(X, lost_mass=np.zeros(2, np.float32)),
    "indices of other rows": reply_frame(X, indices=np.zeros((4, 2), np.int64)),
    "no output": wire.encode("reply", {"request_id": "r", "epoch": 1, "versions": {}}),
    "cut short": reply_frame(X)[:-1],
}


@pytest.mark.parametrize("case", BAD_REPLIES)
def test_a_reply_that_is_none_is_data_loss_not_the_callers_fault(case: str) -> None:
    world = World()
    with pytest.raises(DataLoss):
        world.run(world.calls.call("news", X), lambda _: BAD_REPLIES[case])


def test_status_and_drain_are_documents_longer_than_any_header() -> None:
    world = World()
    document = {"layers": ["x" * 5000] * 30, "ümlaut": None}
    for flow, kind in ((world.calls.status(), "status"), (world.calls.drain(timeout=1.0), "drain")):
        assert world.run(flow, lambda _: encode_document("status", document)) == document
        request = wire.decode(world.attempts[-1].payload)
        assert (request.kind, request.meta, request.tensors) == (kind, {}, {})
    assert [attempt.method.rpartition("/")[2] for attempt in world.attempts] == ["Status", "Drain"]


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_documents_that_are_none(text: bytes) -> None:
    frame = wire.decode(wire.encode("status", {}, {"json": WireTensor("uint8", (len(text),), text)}))
    with pytest.raises(DataLoss):
        decode_document(frame, "status")


def test_an_error_names_the_request_whoever_made_it() -> None:
    world = World()
    with pytest.raises(Unavailable) as ours:
        world.run(world.calls.call("news", X), down)
    assert ours.value.request_id == "id-0"
    assert len({attempt.payload for attempt in world.attempts}) == 1
    with pytest.raises(NotFound) as theirs:
        world.run(world.calls.call("news", X), lambda _: NotFound("no such layer", request_id="theirs"))
    assert theirs.value.request_id == "theirs"


def test_health_is_asked_once_and_answered_by_name() -> None:
    world = World()
    assert world.run(world.calls.health(), lambda _: b"\x08\x01") == "SERVING"
    assert world.run(world.calls.health("expertmesh.v1.Mesh"), lambda _: b"\x08\x02") == "NOT_SERVING"
    assert world.run(world.calls.health(), lambda _: b"") == "UNKNOWN"
    assert [attempt.payload for attempt in world.attempts] == [b"", b"\x0a\x12expertmesh.v1.Mesh", b""]
    assert {attempt.method for attempt in world.attempts} == {"/grpc.health.v1.Health/Check"}
    with pytest.raises(Unavailable):
        world.run(world.calls.health(), down)
    assert len(world.attempts) == 4
    with pytest.raises(DataLoss):
        world.run(world.calls.health(), lambda _: b"\x08")


@pytest.mark.parametrize("name", list(wire.ITEM_SIZES))
@pytest.mark.parametrize("shape", [(3, 2), (0, 4), (2, 0), (3,)])
def test_torch_in_torch_out(name: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    world = World()
    x = (torch.arange(float(np.prod(shape))) - 2).reshape(shape).to(getattr(torch, name))
    y = world.run(world.calls.forward("news", x), echo)
    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device)
    assert torch.equal(x, y)
    y.fill_(1)
    assert wire.decode(world.attempts[0].payload).tensors["x"].dtype == name


@pytest.mark.filterwarnings("ignore:x requires gradients")
def test_torch_tensors_of_any_layout_and_with_gradients() -> None:
    torch = pytest.importorskip("torch")
    world = World()
    for x in (
        torch.randn(4, 6).T,
        torch.randn(8, 3)[::2],
        torch.randn(3, 2, requires_grad=True),
        torch.ones(1).expand(5, 3),
    ):
        y = world.run(world.calls.forward("news", x), echo)
        assert torch.equal(x, y)
        assert not y.requires_grad


def test_rows_that_require_gradients_are_warned_about_while_gradients_are_recorded() -> None:
    torch = pytest.importorskip("torch")
    world, x = World(), torch.randn(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"x requires gradients, but none flow back .*x\.detach\(\)"):
        world.run(world.calls.forward("news", x), echo)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        world.run(world.calls.forward("news", x), echo)


def test_torch_replies_are_torch_throughout() -> None:
    torch = pytest.importorskip("torch")
    world = World()
    frame = reply_frame(X, indices=np.ones((3, 2), np.int64), weights=np.ones((3, 2), np.float32))
    reply = world.run(world.calls.call("news", torch.zeros(3, 2), gate_input=X), lambda _: frame)
    assert (reply.lost_mass.dtype, reply.lost_mass.shape) == (torch.float32, (3,))
    assert (reply.indices.dtype, reply.weights.dtype) == (torch.int64, torch.float32)
    assert "Tensor[3, 2] torch.float32" in repr(reply)


def test_torch_tensors_that_cannot_be_sent() -> None:
    torch = pytest.importorskip("torch")
    world = World()
    for x, said in (
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 2).to_sparse(), "dense"),
        (torch.zeros(2, device="meta"), "dense"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            world.run(world.calls.forward("news", x), echo)


def test_a_torch_that_is_only_half_imported_is_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    world = World()
    assert isinstance(world.run(world.calls.forward("news", X), echo), np.ndarray)


def test_a_call_carries_the_token_of_the_lowest_role_that_may_make_it() -> None:
    calls = Calls(token="highest", tokens={Role.READER: "reader", Role.OPERATOR: "operator", Role.ADMIN: "admin"})
    code = {"l/e": {"factory": "mine:Expert"}}
    flows = {
        "Call": calls.call("l", X), "Status": calls.status(), "Check": calls.health(), "Drain": calls.drain(),
        "History": calls.history("l/e"), "Pin": calls.lease(), "SwapProgress": calls.swap_progress("s"),
    }  # fmt: skip
    sent = {method: next(flow) for method, flow in flows.items()}
    assert {method: dict(step.metadata)["authorization"] for method, step in sent.items()} == {
        method: f"Bearer {METHODS[method].label}" for method in flows
    }
    assert dict(next(calls.swap(code)).metadata)["authorization"] == "Bearer highest"  # only an admin names code
    assert dict(next(Calls(token="given").drain()).metadata)["authorization"] == "Bearer given"
