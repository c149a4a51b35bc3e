"""Weights files: what is whole is described exactly, what is not is refused, in little memory, by our errors alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers.artefacts import describe, raw_file, sha256_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import (
    DataLoss,
    ExpertMeshError,
    FailedPrecondition,
    NotFound,
    SpecMismatch,
    TooLarge,
)
from expertmesh.experts.weights import inspect
from expertmesh.experts.weights.files import described, load_tensors, save_tensors
from expertmesh.experts.weights.header import DTYPES, LONGEST_NAME
from expertmesh.experts.weights.inspect import ArtefactLimits, inspect_artefact, norms_of, survey

MIB = 2**20
SLOW = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {"weight": torch.arange(1.0, 13.0).reshape(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)}


def filled(shape: list[int], dtype: torch.dtype) -> Tensor:
    return (torch.arange(math.prod(shape)) % 2 + 1 - int(dtype == torch.bool)).reshape(shape).to(dtype)


tensors = st.dictionaries(
    st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
    st.builds(filled, st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(DTYPES.values(), key=str))),
    max_size=5,
)


@given(
    state=tensors,
    metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2),
    chunk=st.sampled_from([8, 64, MIB]),
)
@SLOW
def test_what_is_written_is_described_exactly(
    state: dict[str, Tensor], metadata: dict[str, str], chunk: int, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, state, metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "CHUNK", chunk)
        found = inspect_artefact(path, sha256=sha256_of(path), wanted=described(state))
        surveyed = survey(state)
    assert (found.path, found.sha256, found.nbytes) == (path, sha256_of(path), path.stat().st_size)
    assert found.tensors == described(state) == surveyed.tensors
    assert found.digests == surveyed.digests
    assert found.norms == pytest.approx(norms_of(state))
    assert surveyed.norms == pytest.approx(norms_of(state))
    assert found.tensor_bytes == sum(value.nbytes for value in state.values())


def test_norms_are_exact_where_the_dtype_overflows() -> None:
    state = {
        "half": torch.full((4,), 60000.0, dtype=torch.float16),
        "large": torch.tensor([3e38, 2e38]),
        "complex": torch.tensor([3 + 4j], dtype=torch.complex64),
        "count": torch.tensor([7]),
    }
    wanted = {"half": 120_000.0, "large": math.hypot(3e38, 2e38), "complex": 5.0}
    assert survey(state).norms == pytest.approx(wanted)


def test_huge_and_tiny_float64_are_finite_and_not_zero() -> None:
    assert survey({"a": torch.tensor([1e200, 1e200], dtype=torch.float64)}).norms == {"a": math.inf}
    assert survey({"a": torch.tensor([0, 1e-300], dtype=torch.float64)}).digests


def with_value(dtype: torch.dtype, value: float) -> Tensor:
    bad = torch.ones(5).to(dtype)
    bad[3] = value
    return bad


SPOILT = {
    f"{name} {value}": with_value(dtype, value)
    for name, dtype in DTYPES.items()
    for value in (math.nan, math.inf, -math.inf)
    if dtype.is_floating_point or dtype.is_complex
    if not (dtype == torch.float8_e4m3fn and math.isinf(value))  # it has none
}


@pytest.mark.parametrize("name", SPOILT)
def test_nan_and_infinity_are_found_in_every_dtype_that_has_them(name: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"good": torch.ones(2), "bad": SPOILT[name]})
    with pytest.raises(FailedPrecondition, match=r"'bad' has NaN or infinite values.*use an earlier checkpoint"):
        inspect_artefact(tmp_path / "w.safetensors")


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(0)}, {"steps": torch.zeros(3, dtype=torch.int64)}], ids=str)
def test_what_has_no_floating_numbers_is_not_all_zero(state: dict[str, Tensor]) -> None:
    assert survey(state).tensors == described(state)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_all_zeros_are_refused(zero: float) -> None:
    with pytest.raises(FailedPrecondition, match="are zero: the weights were never filled in"):
        survey({"a": torch.full((3,), zero), "steps": torch.ones(1, dtype=torch.int64)})


ENTRY = describe([1], 0, 4)
A = json.dumps(ENTRY).encode()


def entry(**changes: object) -> bytes:
    return json.dumps({"a": {**ENTRY, **changes}}).encode()


HEADERS: dict[str, tuple[bytes, str]] = {
    "no object": (b"[]", "is not a map"),
    "nothing": (b"", "Expecting value: line 1 column 1"),
    "blanks": (b"   ", "Expecting value: line 1 column 4"),
    "not closed": (b'{"a":' + A, "Expecting ',' delimiter"),
    "text behind": (b'{"a":%s}{}' % A, "Extra data"),
    "not UTF-8": (b'{"\xff":1}', "'utf-8' codec"),
    "a number": (b'{"a":1}', "must have dtype, shape"),
    "half a pair": (b'{"\\ud800":%s}' % A, "not text"),
    "control sign": (b'{"a\n":%s}' % A, "Invalid control character at: line 1 column 4"),
    "a string open": (b'{"a', "Unterminated string"),
    "a comma too many": (b'{"a":%s,}' % A, "not JSON"),
    "a name twice": (b'{"a":%s,"a":%s}' % (A, json.dumps(describe([0], 4, 4)).encode()), "key 'a' appears twice"),
    "a long name": (b'{"%s":%s}' % (b"a" * (LONGEST_NAME + 1), A), "longer than 512 characters"),
    "metadata of numbers": (b'{"__metadata__":{"a":1},"a":%s}' % A, "not a map of text"),
    "metadata nested": (b'{"__metadata__":{"a":{"b":"c"}},"a":%s}' % A, "not a map of text"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},"a":%s}' % A, "key '__metadata__' appears twice"),
    "much metadata": (b'{"__metadata__":{%s"a":""},"a":%s}' % (b'"":"",' * 1000, A), "key '' appears twice"),
    "a key twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "'dtype' appears twice",
    ),
    "a key too many": (entry(order="C"), "and nothing else"),
    "a key missing": (b'{"a":{"shape":[1],"data_offsets":[0,4]}}', "must have dtype, shape"),
    "nested lists": (entry(shape=[[1]]), "not lists of sizes"),
    "nested deeply": (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "recursion"),
    "a list of lists": (b'{"a":[' + b"[]," * 9 + b"[]]}", "must have dtype, shape"),
    "negative size": (entry(shape=[-1]), "not lists of sizes"),
    "a size of true": (entry(shape=[True]), "not lists of sizes"),
    "a size of 1.0": (entry(shape=[1.0]), "not lists of sizes"),
    "NaN": (entry(shape=[float("nan")]), "not lists of sizes"),
    "no JSON": (b'{"a":{"dtype":"F32","shape":[1 1],"data_offsets":[0,4]}}', "is not JSON"),
    "overflow": (entry(shape=[2**32, 2**32]), "impossible shape"),
    "zero times huge": (entry(shape=[0, 2**62, 2**62]), "impossible shape"),
    "a hundred dims": (entry(shape=[1] * 100), "impossible shape"),
    "offsets backwards": (entry(data_offsets=[4, 0]), "its data_offsets span -4"),
    "three offsets": (entry(data_offsets=[0, 2, 4]), "not lists of sizes"),
    "too few bytes": (entry(data_offsets=[0, 3]), "needs 4 bytes"),
    "a gap": (b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}', "leave a gap"),
    "bytes of no tensor": (b"{}", "belong to no tensor"),
    "too few for the tensor": (entry(shape=[2], data_offsets=[0, 8]), "it is truncated"),
    "a dtype that is no string": (entry(dtype=4), "a dtype that is not text"),
    "a million digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"1" * 10**6 + b'],"data_offsets":[0,4]}}',
        "0 digits",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_header_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret" / "w.safetensors"
    path.parent.mkdir()
    path.write_bytes(raw_file(HEADERS[name][0], bytes(4)))
    with pytest.raises(DataLoss) as caught:
        inspect_artefact(path)
    assert caught.value.message.startswith("weights file 'w.safetensors': ")
    assert HEADERS[name][1] in caught.value.message
    assert "again" in caught.value.message
    assert "secret" not in caught.value.message
    assert len(caught.value.message) < 400


def test_a_header_may_have_blanks_and_any_order(tmp_path: Path) -> None:
    header = (
        b' { "b" :\t{"data_offsets":[4,8], "shape":[], "dtype":"F32"} ,\n "a":%s } \r\n' % json.dumps(ENTRY).encode()
    )
    (tmp_path / "w").write_bytes(raw_file(header, b"\0\0\x80\x3f" * 2))
    assert inspect_artefact(tmp_path / "w").tensors == {"a": ((1,), "float32"), "b": ((), "float32")}


def test_an_unknown_dtype_and_impossible_booleans(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(raw_file(json.dumps({"a": describe([8], 0, 4, "F4")}).encode(), bytes(4)))
    with pytest.raises(SpecMismatch, match="'a' has dtype 'F4'; write it as one of F64, F32"):
        inspect_artefact(tmp_path / "w")
    (tmp_path / "w").write_bytes(raw_file(json.dumps({"a": describe([4], 0, 4, "BOOL")}).encode(), b"\0\1\2\0"))
    with pytest.raises(DataLoss, match="'a' has dtype bool but bytes other than 0 and 1"):
        inspect_artefact(tmp_path / "w")


def test_each_limit_is_held_and_named(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", GOOD)
    size = (tmp_path / "w").stat().st_size
    for limits in ({"max_bytes": size - 1}, {"max_tensors": 1}, {"max_header_bytes": 9}):
        with pytest.raises(TooLarge, match=f"{next(iter(limits))}.*raise"):
            inspect_artefact(tmp_path / "w", limits=ArtefactLimits(**limits))
    inspect_artefact(tmp_path / "w", limits=ArtefactLimits(max_bytes=size, max_tensors=2))


def test_the_size_limit_holds_for_a_sparse_file_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    os.truncate(tmp_path / "w", 2**40)
    with pytest.raises(TooLarge, match="max_bytes"):
        inspect_artefact(tmp_path / "w")


def test_the_first_three_that_do_not_fit_are_named_before_the_rest_is_read(tmp_path: Path) -> None:
    bad = {"weight": GOOD["weight"].t() * torch.nan, "x": torch.ones(1), "y": torch.ones(1)}
    save_tensors(tmp_path / "w", bad)
    with pytest.raises(SpecMismatch) as caught:
        inspect_artefact(tmp_path / "w", sha256="0" * 64, wanted=described(GOOD), owner="gate")
    assert caught.value.message == (
        "weights file 'w': it does not fit the gate: 'weight' is [4, 3] float32, but the gate has [3, 4] float32; "
        "missing 'bias'; unexpected 'x' (and 1 more); write exactly the tensors of the gate it replaces"
    )


def test_a_checksum_is_compared_before_the_numbers_are_judged(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", {"a": torch.zeros(3)})
    with pytest.raises(DataLoss, match=r"its sha256 is .*, but the sender's is '000000000000'.*: send it again"):
        inspect_artefact(tmp_path / "w", sha256="0" * 64)
    with pytest.raises(FailedPrecondition):
        inspect_artefact(tmp_path / "w", sha256=sha256_of(tmp_path / "w").upper())


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "."):
        with pytest.raises(NotFound, match="is a folder" if name == "." else "there is no weights file"):
            inspect_artefact(tmp_path / name)


@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_that_changes_while_it_is_read(change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    save_tensors(path, {"a": torch.ones(10_000)})
    size = path.stat().st_size
    monkeypatch.setattr(inspect, "check_described", lambda *_: os.truncate(path, size + change))
    with pytest.raises(DataLoss, match=f"it {'grew' if change > 0 else 'shrank'} while it was read"):
        inspect_artefact(path, wanted={})


def test_inspection_takes_little_memory_whatever_the_size(tmp_path: Path) -> None:
    header = json.dumps({"a": describe([2**23], 0, 2**26, "F64")}).encode()
    (tmp_path / "w").write_bytes(raw_file(header, b"\x3f" * 2**26))
    tracemalloc.start()
    before = _resident()
    inspect_artefact(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MIB
    assert _resident() - before < 16 * MIB


def bomb(kind: str, nbytes: int) -> bytes:
    """A header of nearly `nbytes` bytes that is made to cost memory."""
    start, unit, end = {
        "strings": (b'{"', b"a", b'":1}'),
        "escapes": (b'{"', b"\\u00e4", b'":1}'),
        "lists": (b'{"a":[', b"[],", b"[]]}"),
        "nested": (b'{"a":[', b"[[[[[[[[]]]]]]]],", b"[]]}"),
        "maps": (b'{"a":[', b'{"":1},', b"[]]}"),
        "metadata": (b'{"__metadata__":{', b'"":"",', b'"":""}}'),
    }[kind]
    return start + unit * ((nbytes - len(start) - len(end)) // len(unit)) + end


@pytest.mark.parametrize("kind", ["strings", "escapes", "lists", "nested", "maps", "metadata"])
def test_a_header_costs_no_more_than_fifty_times_the_limit_on_its_length(kind: str, tmp_path: Path) -> None:
    limit = ArtefactLimits().max_header_bytes
    for nbytes, error, most in ((limit, DataLoss, 50 * limit), (limit + 99, TooLarge, 99_999)):
        (tmp_path / "w").write_bytes(raw_file(bomb(kind, nbytes), b"1234"))
        tracemalloc.start()
        with pytest.raises(error):
            inspect_artefact(tmp_path / "w")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most


def test_a_header_of_the_most_tensors_with_long_names_is_within_the_limits(tmp_path: Path) -> None:
    limits = ArtefactLimits()
    header = {
        f"model.layers.60.mlp.experts.{n:05}.down_proj.weight_scale_inverse": describe([1, 1], n, n + 1, "F8_E4M3")
        for n in range(limits.max_tensors)
    }
    (tmp_path / "w").write_bytes(raw_file(json.dumps(header).encode(), b"\x38" * limits.max_tensors))
    assert len(inspect_artefact(tmp_path / "w").tensors) == limits.max_tensors


edits = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from(["set", "cut", "add"]), st.binary(max_size=9)), max_size=4
)


@given(edits=edits, wanted=st.booleans())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_described_or_refused_by_our_errors_alone(
    edits: list[tuple[int, str, bytes]], wanted: bool, tmp_path: Path
) -> None:
    path = tmp_path / "w"
    save_tensors(path, GOOD, {"made": "by a test"})
    data = path.read_bytes()
    for at, kind, new in edits:
        behind = {"set": at + len(new), "cut": at + 5, "add": at}[kind]
        data = data[:at] + (b"" if kind == "cut" else new) + data[behind:]
    path.write_bytes(data)
    with contextlib.suppress(ExpertMeshError):
        found = inspect_artefact(path, wanted=described(GOOD) if wanted else None)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert not wanted or found.tensors == described(GOOD)
        assert survey(load_tensors(path)[0]).digests == found.digests


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
