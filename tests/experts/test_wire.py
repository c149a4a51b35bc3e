"""The frame: every message comes back as it was sent, every malformed one is refused, and none costs memory."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from helpers.frames import BOMBS, REFUSED, VALID, deep, frame_of, header_of, mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from expertmesh.experts import wire
from expertmesh.experts.errors import ExpertMeshError, InvalidRequest, TooLarge

WORST_BYTES = 36 * 1024 * 1024
"""msgpack nests 1,024 lists and makes room for 4,096 items in each before it sees that they are missing: 33 MB."""
NUMPY_DTYPES = [np.dtype(name) for name in wire.ITEM_SIZES if name != "bfloat16"]

names = st.text(max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=50),
)
metas = st.dictionaries(
    names, st.one_of(scalars, st.lists(scalars, max_size=5), st.dictionaries(names, scalars, max_size=5)), max_size=8
)
arrays = st.sampled_from(NUMPY_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(kind=names, meta=metas, tensors=st.dictionaries(names, arrays, max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_is_encoded_is_decoded(kind: str, meta: dict[str, Any], tensors: dict[str, Any]) -> None:
    sent = {name: wire.WireTensor.from_numpy(array) for name, array in tensors.items()}
    frame = wire.decode(wire.encode(kind, meta, sent))
    assert (frame.kind, frame.meta) == (kind, meta)
    assert list(frame.tensors) == list(tensors)
    for name, array in tensors.items():
        found = frame.tensors[name].to_numpy()
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()


@given(array=arrays)
@settings(max_examples=50, deadline=None)
def test_any_memory_layout_and_byte_order_can_be_sent(array: Any) -> None:
    for variant in (array.T, array[..., ::2] if array.ndim else array, array.astype(array.dtype.newbyteorder(">"))):
        found = wire.decode(wire.encode("k", {}, {"x": wire.WireTensor.from_numpy(variant)})).tensors["x"].to_numpy()
        assert found.shape == variant.shape
        np.testing.assert_array_equal(found, variant)


@given(bits=hnp.arrays(np.uint16, st.integers(0, 20)))
@settings(max_examples=50, deadline=None)
def test_bfloat16_travels_as_bits_and_widens_exactly(bits: Any) -> None:
    found = wire.decode(wire.encode("k", {}, {"x": wire.WireTensor.from_numpy(bits, "bfloat16")})).tensors["x"]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.to_numpy(), bits)
    widened = wire.bfloat16_to_float32(found.to_numpy())
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened.view(np.uint32) >> 16, bits)
    np.testing.assert_array_equal(widened.view(np.uint32) & 0xFFFF, 0)


def test_tensors_are_aligned_and_share_the_frames_memory() -> None:
    view = memoryview(VALID)
    base = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    for tensor in wire.decode(view).tensors.values():
        array = tensor.to_numpy()
        assert not array.flags.writeable
        if array.size:
            offset = array.__array_interface__["data"][0] - base
            assert offset % wire.ALIGNMENT == 0
            assert 0 < offset < len(VALID)


def test_vectored_parts_are_the_frame() -> None:
    tensor = wire.WireTensor.from_numpy(np.ones(5, np.float64))
    assert b"".join(wire.encode_parts("k", {}, {"x": tensor})) == wire.encode("k", {}, {"x": tensor})


@pytest.mark.parametrize("meta", [{"a": object()}, {"a": 2**64}, {"a": "\ud800"}, {"a": {1, 2}}])
def test_what_msgpack_cannot_say_is_the_callers_error(meta: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        wire.encode("k", meta)


def test_limits_of_encoding() -> None:
    with pytest.raises(TooLarge, match="header"):
        wire.encode("k", {"a": ["x" * 4000] * 20})
    with pytest.raises(InvalidRequest, match="complex64"):
        wire.WireTensor.from_numpy(np.zeros(2, np.complex64))
    with pytest.raises(InvalidRequest, match="bits"):
        wire.WireTensor.from_numpy(np.zeros(2, np.float32), "bfloat16")


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_frames_are_refused(case: str) -> None:
    frame, expected = REFUSED[case]
    with pytest.raises(expected) as caught:
        wire.decode(frame)
    assert type(caught.value) is expected
    assert len(str(caught.value)) < 500


def test_what_stands_at_each_limit_is_accepted() -> None:
    at_limits = [
        frame_of(header_of(meta={"a": deep(2)})),
        frame_of(header_of(meta={"a": "x" * 4096, "b": [0] * 4096})),
        frame_of(header_of(*[[str(n), "int8", [0]] for n in range(16)])),
        frame_of(header_of(["x", "int8", [1] * 8]), bytes(64)),
        frame_of(header_of(["x", "int8", [0, 2**40]])),
        frame_of(header_of(["x", "bool", [2]]), b"\x01\x00" + bytes(62)),
    ]
    for frame in at_limits:
        decoded = wire.decode(frame)
        for tensor in decoded.tensors.values():
            assert tensor.to_numpy().shape == tensor.shape


def test_the_frames_own_limit_names_its_setting() -> None:
    wire.decode(VALID, max_bytes=len(VALID))
    with pytest.raises(TooLarge, match="max_message_bytes"):
        wire.decode(VALID, max_bytes=len(VALID) - 1)


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_in_little_memory(case: str) -> None:
    frame = BOMBS[case]
    tracemalloc.start()
    try:
        with pytest.raises(ExpertMeshError) as caught:
            wire.decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DATA_LOSS")
    assert peak < WORST_BYTES


def test_5000_mutated_frames_decode_or_are_refused() -> None:
    chance = random.Random(20260801)
    refused: list[str] = []
    tracemalloc.start()
    try:
        for _ in range(5_000):
            try:
                frame = wire.decode(mutate(VALID, chance))
                for tensor in frame.tensors.values():
                    assert tensor.to_numpy().nbytes == tensor.nbytes
            except ExpertMeshError as error:
                refused.append(error.code)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(refused) > 3_000
    assert set(refused) <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DATA_LOSS"}
    assert peak < WORST_BYTES
