"""What an expert returned becomes rows that nothing else holds: checked where the expert ran, then copied.

An expert may keep what it returned and write to it when it is called again, before the answer has been sent: it may
answer from one buffer, share one with another expert, or return its input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExpertFailed
from ..tensors import DTYPE_NAMES
from ..wire import ITEM_SIZES, MAX_DIMS

_SENT = {*ITEM_SIZES, *DTYPE_NAMES}
_RETURN = "return a dense torch tensor or numpy array with one row for each row"


def own_rows(result: object, count: int, device: torch.device) -> Tensor:
    """Copy the answer of an expert on `device` to `count` rows: [count, ...], dense, contiguous, native byte order.

    Raises ExpertFailed, which says what was returned and what may be, for anything but a dense tensor or array of
    `count` rows, of at most eight dimensions and a dtype that can be sent.
    """
    if not isinstance(result, (Tensor, np.ndarray, np.generic)):
        raise ExpertFailed(f"an expert must return a tensor or an array; this one returned {type(result).__name__}")
    if unusual := _unusual(result, device):
        raise ExpertFailed(f"the expert returned a {unusual}, which cannot be sent: {_RETURN}")
    shape: tuple[int, ...] = tuple(result.shape)
    if shape[:1] != (count,):
        raise ExpertFailed(f"the expert returned shape {list(shape)} for {count} rows: {_RETURN}")
    if len(shape) > MAX_DIMS:
        raise ExpertFailed(
            f"the expert returned {len(shape)} dimensions, but at most {MAX_DIMS} can be sent: flatten some of them"
        )
    dtype = result.dtype if isinstance(result, Tensor) else result.dtype.name
    if dtype not in _SENT:
        dtype = str(dtype).removeprefix("torch.")
        raise ExpertFailed(f"the expert returned {dtype}, which cannot be sent: return one of {', '.join(ITEM_SIZES)}")
    if isinstance(result, Tensor):
        return result.detach().clone(memory_format=torch.contiguous_format)
    return torch.from_numpy(np.array(result, dtype=result.dtype.newbyteorder("="), order="C"))


def _unusual(result: Tensor | np.ndarray[Any, Any] | np.generic, device: torch.device) -> str:
    """What a result is, if its rows are not plain numbers in memory; else empty."""
    if not isinstance(result, Tensor):
        return "masked array" if isinstance(result, np.ma.MaskedArray) else ""
    kind = type(result)
    if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return kind.__name__  # a wrapper without memory of its own
    if result.is_nested:
        return "nested tensor"
    if result.layout is not torch.strided:
        return f"{str(result.layout).removeprefix('torch.').removeprefix('_')} tensor"
    return "meta tensor, without data" if result.is_meta and device.type != "meta" else ""
