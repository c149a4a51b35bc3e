"""Tensors to bytes and back: every dtype, every layout, nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import InvalidRequest
from expertmesh.experts.tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    byte_view,
    dtype_name,
    from_bytes,
    from_wire,
    to_wire,
    torch_dtype,
)
from expertmesh.experts.weights.files import torch_name
from expertmesh.experts.weights.header import DTYPES
from expertmesh.experts.wire import decode, encode


def any_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype)[..., 0]


random_tensors = st.builds(
    any_tensor, st.lists(st.integers(0, 4), max_size=4), st.sampled_from(list(DTYPE_NAMES)), st.integers(0, 999)
)


@given(random_tensors, st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_bit_comes_back_also_through_a_frame(tensor: Tensor, turned: bool) -> None:
    if turned:
        tensor = tensor.transpose(0, -1) if tensor.ndim > 1 else tensor
    frame = decode(encode("call", {}, {"x": to_wire(tensor)}))
    back = from_wire(frame.tensors["x"])
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(torch.nan_to_num(back.double(), 7.25), torch.nan_to_num(tensor.double(), 7.25))
    assert bytes(byte_view(back)) == bytes(byte_view(tensor.contiguous()))


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.zeros(3, 4)
    view = to_wire(tensor).data
    tensor[1, 2] = 7.0
    assert torch.equal(from_bytes(bytes(view), "float32", (3, 4)), tensor)
    assert from_bytes(view, "float32", (3, 4)).data_ptr() == tensor.data_ptr()


def test_parameters_and_inference_tensors_can_be_sent() -> None:
    with torch.inference_mode():
        inside = torch.ones(2)
    assert bytes(byte_view(inside)) == bytes(byte_view(torch.ones(2, requires_grad=True)))


@pytest.mark.parametrize("name", list(TORCH_DTYPES))
def test_names_and_dtypes_are_one_to_one(name: str) -> None:
    assert dtype_name(torch_dtype(name)) == name


def test_what_cannot_cross_is_said() -> None:
    with pytest.raises(InvalidRequest, match=r"torch\.complex64 cannot be sent; use one of float64"):
        dtype_name(torch.complex64)
    with pytest.raises(InvalidRequest, match="'complex64' is not known"):
        torch_dtype("complex64")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex128])
def test_weights_of_every_dtype_become_bytes_and_are_read_back(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    back = from_bytes(bytes(byte_view(tensor)), torch_name(dtype), (2, 3))
    assert (back.dtype, back.shape) == (dtype, (2, 3))
    assert bytes(byte_view(back)) == bytes(byte_view(tensor))
    assert from_bytes(b"", torch_name(dtype), (0, 3)).dtype == dtype
    for name in ("", "nn", "float8", "Tensor"):
        with pytest.raises(InvalidRequest, match="is not known"):
            from_bytes(b"", name, (0,))
