"""Converts the caller's arrays to wire tensors and back: numpy stays numpy, torch stays torch on its device.

This file never imports torch: a process that holds a tensor has already imported it, so `sys.modules` has it. Outputs
are copied out of the reply once, so they are writable and own their memory.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ...experts.errors import InvalidRequest
from ...experts.wire import ITEM_SIZES, WireTensor, bfloat16_to_float32
from .half_precision import HALF_DTYPES, check_rows, overflow, to_bfloat16, to_float16


@dataclass(frozen=True)
class ArrayKind:
    """The array type of outputs: torch tensors on `device`, or numpy arrays (`torch` is None).

    `raw` keeps bfloat16 as uint16 bits in numpy arrays; otherwise it is converted to float32. `widen` converts float16
    and bfloat16 to float32, because the caller's rows were narrowed.
    """

    torch: ModuleType | None = None
    device: Any = None
    raw: bool = False
    widen: bool = False

    def restore(self, tensor: WireTensor) -> Any:
        """A writable array or tensor with the values and shape of a wire tensor."""
        return self._numpy(tensor) if self.torch is None else self._torch(self.torch, tensor)

    def zeros(self, rows: int) -> Any:
        """float32 zeros [rows]."""
        return self.restore(WireTensor("float32", (rows,), bytes(4 * rows)))

    def _numpy(self, tensor: WireTensor) -> Any:
        if tensor.dtype == "bfloat16" and (self.widen or not self.raw):
            return bfloat16_to_float32(tensor.to_numpy())
        if tensor.dtype == "float16" and self.widen:
            return tensor.to_numpy().astype(np.float32)
        return tensor.to_numpy().copy()

    def _torch(self, torch: ModuleType, tensor: WireTensor) -> Any:
        dtype = getattr(torch, tensor.dtype)
        target = torch.float32 if self.widen and tensor.dtype in HALF_DTYPES else dtype
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=target, device=self.device)
        owned = torch.from_numpy(np.frombuffer(tensor.data, np.uint8).copy())
        return owned.view(dtype).reshape(tensor.shape).to(self.device).to(target)


def to_wire(value: Any, *, name: str, raw: bool = False, half: str | None = None) -> tuple[WireTensor, ArrayKind]:
    """Convert an array, a torch tensor, or anything that numpy converts to an array; also returns the type for outputs.

    `raw` sends uint16 arrays as bfloat16 bits. `half` converts float32 to "float16" or "bfloat16". Raises
    InvalidRequest, with `name`, for unsupported values.
    """
    torch = sys.modules.get("torch")
    tensor_class = getattr(torch, "Tensor", None)
    if torch is not None and tensor_class is not None and isinstance(value, tensor_class):
        tensor = _from_torch(torch, value, name, half)
        return tensor, ArrayKind(
            torch, value.device, widen=value.dtype == torch.float32 and tensor.dtype in HALF_DTYPES
        )
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} must be an array of numbers: {error}") from None
    if not array.dtype.isnative:  # big-endian, as FITS, HDF5 and IDX have it
        array = array.astype(array.dtype.newbyteorder("="))
    bits = raw and array.dtype == np.uint16
    if not bits and array.dtype.name not in ITEM_SIZES:
        raise InvalidRequest(_refusal(name, array.dtype.name))
    if half and check_rows(name, "bfloat16" if bits else array.dtype.name, half):
        shrink = to_bfloat16 if half == "bfloat16" else to_float16
        return WireTensor.from_numpy(shrink(array, name), half), ArrayKind(raw=raw, widen=True)
    return WireTensor.from_numpy(array, "bfloat16" if bits else None), ArrayKind(raw=raw)


def _from_torch(torch: ModuleType, tensor: Any, name: str, half: str | None) -> WireTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_SIZES:
        raise InvalidRequest(_refusal(name, dtype))
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidRequest(f"{name} must be a dense tensor with data, not {tensor.layout} on {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            f"{name} requires gradients, but none flow back through a cluster: pass {name}.detach(), or call under "
            "torch.no_grad()",
            stacklevel=2,
        )
    if half and check_rows(name, dtype, half):
        wide, dtype = tensor.detach(), half
        tensor = wide.to(getattr(torch, half))
        if bool((tensor.isinf() & wide.isfinite()).any()):
            raise overflow(name, half)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return WireTensor(dtype, tuple(tensor.shape), memoryview(flat.view(torch.uint8).numpy()))


def _refusal(name: str, dtype: str) -> str:
    return f"{name} has dtype {dtype}, which cannot be sent; use one of {', '.join(ITEM_SIZES)}"
