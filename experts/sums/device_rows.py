"""Rows on their way to a CUDA device and back: through pinned memory, on streams that do nothing but copy.

On the CPU there is nothing to do, and nothing is done. Shapes: N rows; rows may have any trailing shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Rows [N, ...] of host memory on a device, in the same dtype; on "cpu" the tensor itself.

    The work that follows on the current stream of the device waits for the rows, the caller does not. The memory of
    `tensor` may be read-only and strided; it is not looked at any more when this returns.
    """
    if tensor.is_cpu:
        if device == "cpu":
            return tensor
        if device.startswith("cuda"):
            return _up(tensor, device)
    return tensor.to(device)


def to_host_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows [N, ...] of devices in host memory, complete when this returns: one wait for all of a device.

    Dtypes are real; a tensor that is in host memory already is left as it is. Raises what went wrong on a device until
    then.
    """
    streams = {tensor.device: _copy_streams(tensor.device)[1] for tensor in tensors if tensor.is_cuda}
    for device, down in streams.items():
        down.wait_stream(torch.cuda.current_stream(device))
    held = [_down(tensor, streams[tensor.device]) if tensor.is_cuda else tensor.cpu() for tensor in tensors]
    for down in streams.values():
        down.synchronize()  # until here the caller holds `tensors`: their memory needs no record_stream
    return held


def _up(tensor: Tensor, device: str) -> Tensor:
    compute = torch.cuda.current_stream(device)
    up = _copy_streams(compute.device)[0]
    pinned = _pinned_like(tensor).copy_(tensor)  # torch's allocator keeps it until the copy on `up` has been made
    with torch.cuda.stream(up):
        rows = pinned.to(compute.device, non_blocking=True)
    compute.wait_stream(up)
    rows.record_stream(compute)  # it belongs to `up`: no later copy may get its memory while it is computed with
    return rows


def _down(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    with torch.cuda.stream(stream):
        plain = tensor.resolve_neg()  # a negation that is only noted would be done on the host, before the bytes come
        return _pinned_like(plain).copy_(plain, non_blocking=True)


def _pinned_like(tensor: Tensor) -> Tensor:
    """New page-locked host memory, contiguous, of the shape and dtype of a tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


@cache
def _copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of a device (with its number) for copies up and down: two, as answers wait for what is computed."""
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return up, down
