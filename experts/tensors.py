"""Conversion of torch tensors to and from raw bytes without copies, for all wire dtypes including bf16."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidRequest
from .wire import ITEM_SIZES, WireTensor

warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZES}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for a wire dtype name. Raises InvalidRequest for an unknown name."""
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        raise InvalidRequest(f"dtype {name!r} is not known; use one of {', '.join(TORCH_DTYPES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The wire dtype name of a torch dtype. Raises InvalidRequest for a dtype that cannot be sent."""
    try:
        return DTYPE_NAMES[dtype]
    except KeyError:
        raise InvalidRequest(f"dtype {dtype} cannot be sent; use one of {', '.join(TORCH_DTYPES)}") from None


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: [nbytes]. Copies only from a device or a strided tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def from_bytes(data: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View bytes as a tensor of `shape`, which must not be written to.

    `dtype` is any dtype as torch names it: weights have more of them than rows. Raises InvalidRequest for another.
    """
    kind, count = getattr(torch, dtype, None), math.prod(shape)
    if not isinstance(kind, torch.dtype):
        kind = torch_dtype(dtype)
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind, count=count).view(shape)


def to_wire(tensor: Tensor) -> WireTensor:
    """View a tensor as a wire tensor; a contiguous tensor on the CPU is not copied."""
    return WireTensor(dtype_name(tensor.dtype), tuple(tensor.shape), byte_view(tensor))


def from_wire(tensor: WireTensor) -> Tensor:
    """View a wire tensor as a torch tensor that shares the frame's memory."""
    return from_bytes(tensor.data, tensor.dtype, tensor.shape)
