"""Every kind of packed experts that the tests compute, by name: arguments of `PackedExperts`."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu with bias": {"activation": "gelu", "bias": True},
    "plain": {"gated": False, "activation": "relu", "bias": True},
    "gpt-oss": {"bias": True, "transposed": True, "interleaved": True, "limit": 0.5},
    "transposed": {"transposed": True},
}
