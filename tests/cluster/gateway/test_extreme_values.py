"""Extreme values in every field of every method, and every argument of a client: never an error of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertmesh.cluster.client.client import Client
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.owner.cluster import Cluster
from expertmesh.cluster.rpc.channel_options import client_options
from expertmesh.cluster.rpc.methods import METHODS, SERVICE, Role
from expertmesh.cluster.rpc.streams import Streamed
from expertmesh.experts import wire
from expertmesh.experts.errors import ExpertMeshError, InvalidRequest
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

NAME = "extremes"
X = np.ones((2, 4), np.float32)
OURS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "CANCELLED", "UNIMPLEMENTED"}
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

Header = dict[str, Any]
FIELDS: dict[str, Header] = {
    "Call": {
        "layer": "linear", "request_id": "r", "top_k": 1, "allow": ["linear/a"], "deny": ["linear/b"],
        "on_missing": "error", "max_lost_mass": 0.5, "return_routing": True, "epoch": 1, "min_epoch": 0, "cluster": "",
        "pin": "p",
    },
    "Status": {}, "Drain": {"not": "at all"}, "Leases": {}, "Declared": {}, "SwapProgress": {"swap_id": "s"},
    "Pin": {"ttl": 0.001}, "History": {"id": "linear/a"}, "Unpin": {"pin": "p"},
    "Upload": {"upload_id": "0" * 32, "offset": 0, "total": 0, "sha256": EMPTY, "last": True},
}  # fmt: skip
FIELDS["CallStream"] = FIELDS["Call"]
SWAP: Header = {
    "swap_id": "s", "changes": {"linear/a": {"version": "v1-0123456789ab"}}, "expect": {"linear/a": "v1-0123456789ab"},
    "policy": {"max_drift": 0.5, "probe_rows": 4, "max_norm_ratio": 10.0, "allow_norm": True}, "mode": "double",
    "timeout": 1.0, "dry_run": True,
}  # fmt: skip
CHANGE: Header = {
    "upload": "0" * 32, "sha256": EMPTY, "version": "v1-0123456789ab", "factory": "torch.nn:Linear", "args": [4, 4],
    "kwargs": {"bias": False},
}  # fmt: skip

NUMBERS = [0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, -1e308, 5e-324, 0.5,
           math.nan, math.inf, -math.inf]  # fmt: skip
TEXTS = ["", "\0", "a\nb", "x" * 4096, "\U0001f600" * 900, "../../etc", "linear", "linear/a", "v1-0123456789ab",
         "v" + "9" * 400 + "-0123456789ab", "error", "fallback:", "fallback:a", "%s%n", "9" * 4000]  # fmt: skip


def deep(levels: int, kind: str = "list") -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind == "list" else {"a": value}
    return value


in_header = st.sampled_from(
    [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], {"a": {}}, ["linear/a"] * 4096, [2**64 - 1], [None], deep(2),
     {"x": 10**15}, {str(n): n for n in range(4000)}]
)  # fmt: skip
in_document = st.one_of(
    in_header.filter(lambda value: not (isinstance(value, float) and not math.isfinite(value))),
    st.sampled_from([10**400, -(10**400), deep(50), deep(400), deep(900), deep(100, "map"), [10**400], {"a": 10**400}]),
)
dtypes = st.sampled_from(list(wire.ITEM_SIZES))
shapes = st.sampled_from([(2, 4), (2, 4), (0, 4), (2, 0), (2,), (), (1, 1, 1, 1, 1, 1, 1, 4), (2, 5), (3, 4), (2, 1)])
values = st.sampled_from([0.0, 1.0, -1.0, 65504.0, 1e30, 3e38, math.nan, math.inf, -math.inf, 2.0**62])


@st.composite
def tensors(draw: st.DrawFn) -> wire.WireTensor:
    dtype, shape, value = draw(dtypes), draw(shapes), draw(values)
    with np.errstate(all="ignore"):
        array = np.full(shape, value, np.float32)
        if dtype == "bfloat16":
            return wire.WireTensor.from_numpy((array.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
        return wire.WireTensor.from_numpy(array.astype(dtype))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    linear = {name: Expert("torch.nn:Linear", args=(4, 4), kwargs={"bias": False}) for name in "ab"}
    layers = [
        Layer("linear", gates.TopK(4, 2, k=1), linear),
        Layer("doubled", gates.Fixed([2.0]), {"a": Expert("torch:abs")}),
        Layer("any", gates.Fixed([0.5, 0.5]), {"a": Expert("torch:abs"), "b": Expert("numpy:sin")}),
    ]
    with Cluster.start(layers, transport="local", port=0, metrics_port=None, name=NAME, default_timeout=10.0) as it:
        with Client(it.endpoint) as client:
            client.forward("any", X)  # which rows a plain function answers is known from those that it answered
        yield it


@pytest.fixture(scope="module")
def channel(cluster: Cluster) -> Iterator[Any]:
    with grpc.insecure_channel(cluster.endpoint, options=client_options(loopback=True)) as made:
        yield made


def code_of(channel: Any, method: str, frame: bytes) -> tuple[str, str]:
    metadata = (("authorization", f"Bearer {read_token(token_path(NAME), Role.ADMIN)}"),)
    try:
        if method == "CallStream":
            sent = Streamed([frame]).messages()
            list(channel.stream_stream(f"/{SERVICE}/{method}")(sent, timeout=30, metadata=metadata))
        else:
            channel.unary_unary(f"/{SERVICE}/{method}")(frame, timeout=30, metadata=metadata)
    except grpc.RpcError as error:
        return str(error.code().name), str(error.details())
    return "OK", ""


def check(channel: Any, method: str, frame: bytes) -> None:
    code, text = code_of(channel, method, frame)
    assert code not in OURS, (code, text, method)
    for private in ("Traceback", ".py", "too large to convert", "object", "0x"):
        assert private not in text, text


SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(data=st.data(), method=st.sampled_from(sorted(FIELDS)))
def test_every_field_of_every_method_may_be_anything(channel: Any, data: st.DataObject, method: str) -> None:
    meta = dict(FIELDS[method])
    if method in ("Call", "CallStream"):
        meta = {name: meta[name] for name in ["layer", *data.draw(st.lists(st.sampled_from(sorted(meta)), max_size=2))]}
        meta["layer"] = data.draw(st.sampled_from(["linear", "any"]))
    for name in data.draw(st.lists(st.sampled_from([*meta, "other"]), min_size=1, max_size=2)):
        meta[name] = data.draw(in_header)
    kind = "call" if method == "CallStream" else method.lower()
    sent = {"x": wire.WireTensor.from_numpy(X)} if kind == "call" else {}
    if method == "Upload":
        sent = {"data": wire.WireTensor("uint8", (0,), b"")}
    try:
        frame = wire.encode(kind, meta, sent)
    except ExpertMeshError:
        return
    check(channel, method, frame)


@SLOW
@given(data=st.data())
def test_every_tensor_of_a_call_may_be_anything(channel: Any, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["gate_input", "top_k_index", "top_k_weights"]), unique=True))
    sent = {name: data.draw(tensors()) for name in ["x", *names]}
    layer = data.draw(st.sampled_from(["linear", "any"]))
    policy = data.draw(st.sampled_from([{}, {"on_missing": "renormalize"}, {"on_missing": "residual"}]))
    code, text = code_of(channel, "Call", wire.encode("call", {"layer": layer} | policy, sent))
    assert code not in OURS, (code, text)


@SLOW
@given(data=st.data())
@example(data=None)
def test_every_value_of_a_swap_may_be_anything(channel: Any, data: st.DataObject | None) -> None:
    document = json.loads(json.dumps(SWAP))
    if data is None:
        document["timeout"] = 10**400
    elif data.draw(st.booleans()):
        document[data.draw(st.sampled_from([*SWAP, "other"]))] = data.draw(in_document)
    else:
        chosen = data.draw(st.lists(st.sampled_from(sorted(CHANGE)), min_size=1, max_size=3))
        change = {name: CHANGE[name] for name in chosen} | {data.draw(st.sampled_from(chosen)): data.draw(in_document)}
        document |= {
            "changes": {data.draw(st.sampled_from(["linear/a", "linear/gate", "none/a"])): change},
            "expect": {},
        }
    text = json.dumps(document).encode()
    check(channel, "Swap", wire.encode("swap", {}, {"json": wire.WireTensor("uint8", (len(text),), text)}))


def test_a_policy_may_be_anything_inside(channel: Any) -> None:
    for name in [*SWAP["policy"], "other"]:
        for value in [*NUMBERS[:-3], *TEXTS, None, True, [], {}, 10**400]:
            text = json.dumps(SWAP | {"policy": {name: value}}).encode()
            check(channel, "Swap", wire.encode("swap", {}, {"json": wire.WireTensor("uint8", (len(text),), text)}))


def test_numbers_beyond_msgpack_and_headers_of_odd_types(channel: Any) -> None:
    for raw in (b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf0" + bytes(6), b"\xca\x7f\xc0\x00\x00"):
        for method in METHODS:
            if method in ("Check", "Watch"):
                continue
            header = msgpack.packb({"kind": method.lower(), "meta": {"a": 0}, "tensors": []})
            data = header.replace(b"\xa1a\x00", b"\xa1a" + raw)
            head = b"XMSH\x01\x00\x00\x00" + len(data).to_bytes(4, "little") + data
            check(channel, method, head + bytes(-len(head) % 64))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_whole_numbers_for_an_expert_of_floats_are_the_callers_error(cluster: Cluster, dtype: str) -> None:
    client = Client(cluster.endpoint, token=str(read_token(token_path(NAME), Role.READER)))
    with client, pytest.raises(InvalidRequest, match=dtype):
        client.forward("linear", X.astype(dtype))


ARGUMENTS: dict[str, list[Any]] = {
    "timeout": [10**400, -(10**400), 2**63, 1e308, math.nan, math.inf, "1", True, None, [], 0, -1],
    "top_k": [10**400, 2**63, -1, 0.5, "1", True, [], deep(5000)],
    "epoch": [10**400, 2**64, 2**63, -(2**63) - 1, -1, 0, 0.5, "1", np.int64(7), deep(5000)],
    "max_lost_mass": [10**400, math.nan, math.inf, -1, 2, "1", []],
    "allow": [[10**400], [None], [[]], 5, {}, ["x" * 10**6], [chr(0xD800)], ["a"] * 5000, deep(5000)],
    "on_missing": [5, "", "x" * 10**6, chr(0xD800), None, []],
    "pin": [5, "", "x" * 10**6, chr(0xD800), []],
    "request_id": [5, "", "x" * 10**6, "\n", chr(0xD800), []],
    "payload_dtype": [5, "", "float8", "x" * 10**6, []],
    "top_k_index": [10**400, [[10**400]], [[2**63]], "x", [[None]], deep(60), object()],
    "gate_input": [10**400, [[10**400]], "x", [None], [["a"]], deep(60), [[1, 2], [3]], object(), 5j],
}


def told(client: Client, *arguments: Any, **options: Any) -> str:
    """The code that a call ends with; any other exception is one of ours."""
    try:
        client.call(*arguments, **options)
    except ExpertMeshError as error:
        return error.code
    return "OK"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_of_a_client_may_be_anything(cluster: Cluster, name: str) -> None:
    with Client(cluster.endpoint, timeout=20.0, token=str(read_token(token_path(NAME), Role.READER))) as client:
        for value in ARGUMENTS[name]:
            assert told(client, "any", X, **{name: value}) not in OURS, value


def test_rows_and_swaps_of_a_client_may_be_anything(cluster: Cluster) -> None:
    with Client(cluster.endpoint, timeout=20.0) as client:
        for rows in (
            10**400,
            [[10**400]],
            "x",
            None,
            [None],
            [["a"]],
            deep(60),
            [[1, 2], [3]],
            object(),
            5j,
            {},
            X[0, 0],
        ):
            with pytest.raises(ExpertMeshError) as caught:
                client.forward("linear", rows)
            assert caught.value.code not in OURS
        for change in ({"factory": "torch.nn:Linear", "kwargs": {"a": deep(5000)}},
                       {"factory": "torch.nn:Linear", "args": [10**400]}, {"version": 10**400}, {"factory": 5},
                       {"factory": "torch.nn:Linear", "kwargs": {"a": object()}}, 5, None, {}):  # fmt: skip
            with pytest.raises(ExpertMeshError) as caught:
                client.swap({"linear/a": change})  # type: ignore[dict-item]
            assert caught.value.code not in OURS, change
        for timeout in (10**400, math.nan, math.inf, -1, "x"):
            with pytest.raises(InvalidRequest):
                client.rollback("linear/a", to="v1-0123456789ab", timeout=timeout)  # type: ignore[arg-type]
        for ttl in (10**400, math.nan, math.inf, -1, "x", None):
            with pytest.raises(InvalidRequest), client.pin(ttl):  # type: ignore[arg-type]
                pass


def test_finite_rows_that_overflow_are_an_error_of_the_caller(cluster: Cluster) -> None:
    with Client(cluster.endpoint) as client:
        for dtype in (np.float16, np.float32, np.float64):
            rows = np.full((2, 4), np.finfo(dtype).max, dtype)
            for policy in ({}, {"on_missing": "residual", "max_lost_mass": 1.0}):
                assert told(client, "linear", rows, **policy) in ("OK", "INVALID_ARGUMENT")
            with pytest.raises(InvalidRequest, match="scale the rows"):
                client.forward("doubled", rows)
