"""Converts float32 rows to float16 or bfloat16, which halves the bytes on the wire; rounds to nearest even.

No torch here: numpy has no bfloat16, so its bits are computed on uint32, in blocks that fit into the caches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...experts.errors import InvalidRequest

HALF_DTYPES = ("float16", "bfloat16")
AS_IT_IS = "float32"
"""The payload dtype that sends rows unchanged, and overrides the client's setting."""

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
BLOCK = 1 << 16
Array = np.ndarray[Any, Any]


def check_payload_dtype(dtype: object) -> None:
    """Check a `payload_dtype`. Raises InvalidRequest."""
    if dtype is not None and dtype not in (*HALF_DTYPES, AS_IT_IS):
        raise InvalidRequest(f"payload_dtype must be one of {', '.join((*HALF_DTYPES, AS_IT_IS))}, not {dtype!r}")


def check_rows(name: str, dtype: str, half: str) -> bool:
    """Whether to half rows of a dtype; float16 and bfloat16 rows are sent unchanged.

    Raises InvalidRequest for any other dtype than float32.
    """
    if dtype in HALF_DTYPES:
        return False
    if dtype != "float32":
        raise InvalidRequest(
            f"payload_dtype={half!r} is for float32 rows, but {name} is {dtype}: convert it to float32, "
            'or send it unchanged with payload_dtype="float32"'
        )
    return True


def overflow(name: str, half: str) -> InvalidRequest:
    """The error for finite values that would become infinite."""
    other = '"bfloat16" or "float32"' if half == "float16" else '"float32"'
    return InvalidRequest(
        f"{name} holds values beyond {LARGEST[half]:g}, the largest {half}: call with payload_dtype={other}"
    )


def to_float16(values: Array, name: str = "x") -> Array:
    """Convert float32 to float16, rounded to nearest even. Raises InvalidRequest if a finite value overflows."""
    with np.errstate(over="ignore", under="ignore"):
        half: Array = values.astype(np.float16)
    _check_finite(values, np.isinf(half), "float16", name)
    return half


def to_bfloat16(values: Array, name: str = "x") -> Array:
    """Convert float32 to bfloat16 bits (uint16), rounded to nearest even; NaN stays NaN, with its sign.

    Raises InvalidRequest if a finite value overflows.
    """
    source = np.ascontiguousarray(values).reshape(-1)
    bits_of = source.view(np.uint32)
    half = np.empty(source.shape, np.uint16)
    for start in range(0, source.size, BLOCK):
        bits = bits_of[start : start + BLOCK]
        magnitude = bits & 0x7FFFFFFF
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        largest = int(magnitude.max())
        if largest >= 0x7F7F8000:  # rounds to infinity, or is infinite or NaN
            _check_finite(source[start : start + BLOCK], (rounded & 0x7FFF) == 0x7F80, "bfloat16", name)
            nan = magnitude > 0x7F800000
            rounded[nan] = (bits[nan] >> 16) | 0x40
        half[start : start + BLOCK] = rounded
    shaped: Array = half.reshape(values.shape)
    return shaped


def _check_finite(values: Array, infinite: Array, half: str, name: str) -> None:
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise overflow(name, half)
