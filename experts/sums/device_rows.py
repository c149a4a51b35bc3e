"""Copies of rows to a CUDA device and back, through pinned memory on dedicated streams.

On the CPU nothing is copied. Shapes: N rows; rows may have any trailing shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Copy rows [N, ...] from host memory to a device, in the same dtype; on "cpu" the tensor itself is returned.

    Later work on the current stream of the device waits for the rows; the caller does not. The memory of `tensor` may
    be read-only and strided; it is no longer used once this returns.
    """
    if tensor.is_cpu:
        if device == "cpu":
            return tensor
        if device.startswith("cuda"):
            return _up(tensor, device)
    return tensor.to(device)


def to_host_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy rows [N, ...] from devices to host memory, and wait once per device for all of its copies.

    Dtypes are real; a tensor that is already in host memory is returned as it is. Raises pending errors of a device.
    """
    streams = {tensor.device: _copy_streams(tensor.device)[1] for tensor in tensors if tensor.is_cuda}
    for device, down in streams.items():
        down.wait_stream(torch.cuda.current_stream(device))
    copies = [_down(tensor, streams[tensor.device]) if tensor.is_cuda else tensor.cpu() for tensor in tensors]
    for down in streams.values():
        down.synchronize()  # until here the caller holds `tensors`: their memory needs no record_stream
    return copies


def _up(tensor: Tensor, device: str) -> Tensor:
    compute = torch.cuda.current_stream(device)
    up = _copy_streams(compute.device)[0]
    pinned = _pinned_like(tensor).copy_(tensor)  # torch's allocator keeps it until the copy on `up` is done
    with torch.cuda.stream(up):
        rows = pinned.to(compute.device, non_blocking=True)
    compute.wait_stream(up)
    rows.record_stream(compute)  # allocated on `up`: its memory must not be reused while `compute` reads it
    return rows


def _down(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    with torch.cuda.stream(stream):
        plain = tensor.resolve_neg()  # a lazy negation would be resolved on the host, before the bytes arrive
        return _pinned_like(plain).copy_(plain, non_blocking=True)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Allocate page-locked, contiguous host memory of the shape and dtype of a tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


@cache
def _copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of a device (with index) for copies up and down: two, because copies down wait for computation."""
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return up, down
