"""Weights files that must be refused: one table for the tests of verification and for those on a live cluster."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.experts.weights.files import save_tensors

BOUND = 0.5
"""The drift that is allowed where a file is refused for its drift alone."""


@dataclass(frozen=True)
class BadArtefact:
    """A file, the sha256 that its sender gives, and how it must be refused: wire code, and words of the message.

    `max_drift` is the bound that the swap must name for it to be refused; None where none is needed.
    """

    name: str
    path: Path
    sha256: str
    code: str
    words: tuple[str, ...]
    max_drift: float | None = None


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    """The bytes of a weights file with this header, whatever it is."""
    return len(header).to_bytes(8, "little") + header + data


def describe(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def bad_artefacts(folder: Path, good_state: dict[str, Tensor]) -> list[BadArtefact]:
    """Write every bad file for an expert with this state, of which one floating tensor must not be zero."""
    good = folder / "good.safetensors"
    save_tensors(good, good_state)
    found = [_of_tensors(folder, *row) for row in _tensor_rows(good_state)]
    found += [_of_bytes(folder, *row) for row in _byte_rows(good.read_bytes(), sha256_of(good))]
    good.unlink()
    return found


def _tensor_rows(state: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor], str, tuple[str, ...], float | None]]:
    key = next(name for name, value in state.items() if value.is_floating_point() and value.any())
    value = state[key]
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    other = torch.float64 if value.dtype != torch.float64 else torch.float32
    misfit, refused = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
    fit = ("does not fit", repr(key), "write exactly")
    return [
        ("wrong_shape", {**state, key: value[..., None].clone()}, misfit, fit, None),
        ("wrong_dtype", {**state, key: value.to(other)}, misfit, fit, None),
        ("missing_key", {name: t for name, t in state.items() if name != key}, misfit, ("missing", repr(key)), None),
        ("extra_key", {**state, "extra": torch.ones(1)}, misfit, ("unexpected 'extra'",), None),
        ("nan", {**state, key: _spoilt(value, torch.nan)}, refused, (repr(key), "NaN", "checkpoint"), None),
        ("infinite", {**state, key: _spoilt(value, torch.inf)}, refused, (repr(key), "infinite", "checkpoint"), None),
        ("all_zero", {**state, **{n: torch.zeros_like(t) for n, t in floating.items()}}, refused, ("zero",), None),
        ("norm_times_5000", {**state, key: value * 5000}, refused, (repr(key), "5000", "allow_norm"), None),
        ("wrong_but_finite", {**state, **{n: -t for n, t in floating.items()}}, refused, ("max_drift",), BOUND),
    ]  # fmt: skip


def _byte_rows(whole: bytes, sha256: str) -> list[tuple[str, bytes, str | None, str, tuple[str, ...]]]:
    header = int.from_bytes(whole[:8], "little") + 8
    middle = (header + len(whole)) // 2
    many = {f"t{i}": describe([], 4 * i, 4 * i + 4) for i in range(11_000)}
    overlapping = {"a": describe([2], 0, 8), "b": describe([2], 4, 12)}
    loss, large, again = "DATA_LOSS", "RESOURCE_EXHAUSTED", "send it again"
    nested = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [
        ("truncated", whole[:-3], sha256, loss, ("truncated", again)),
        ("header_only", whole[:header], sha256, loss, ("truncated", again)),
        ("half_written", whole[:middle] + bytes(len(whole) - middle), sha256, loss, ("sha256", again)),
        ("other_file", whole, hashlib.sha256(b"").hexdigest(), loss, ("sha256", again)),
        ("no_weights_file", b"PK\3\4 archive/data.pkl", None, loss, ("not a safetensors file", again)),
        ("header_of_exabytes", (2**60).to_bytes(8, "little") + whole[8:], None, loss, ("header", again)),
        ("header_too_long", raw_file(b" " * (9 * 2**20)), None, large, ("max_header_bytes", "raise it")),
        ("many_entries", raw_file(json.dumps(many).encode(), bytes(44_000)), None, large, ("max_tensors", "raise it")),
        ("deep_header", raw_file(nested), None, loss, ("malformed", again)),
        ("overlapping", raw_file(json.dumps(overlapping).encode(), bytes(12)), None, loss, ("overlap", again)),
    ]  # fmt: skip


def _of_tensors(
    folder: Path, name: str, tensors: dict[str, Tensor], code: str, words: tuple[str, ...], bound: float | None
) -> BadArtefact:
    path = folder / f"{name}.safetensors"
    save_tensors(path, tensors)
    return BadArtefact(name, path, sha256_of(path), code, words, bound)


def _of_bytes(
    folder: Path, name: str, data: bytes, sha256: str | None, code: str, words: tuple[str, ...]
) -> BadArtefact:
    path = folder / f"{name}.safetensors"
    path.write_bytes(data)
    return BadArtefact(name, path, sha256 or sha256_of(path), code, words)


def _spoilt(value: Tensor, by: float) -> Tensor:
    spoilt = value.clone()
    spoilt.view(-1)[-1] = by
    return spoilt
