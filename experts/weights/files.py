"""Reads and writes tensors as safetensors files, the only supported format."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from ..errors import DataLoss, NotFound, SpecMismatch
from ..tensors import byte_view

Description = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor, the dtype as torch names it: ((2, 3), "float32")."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and text metadata to a safetensors file, atomically."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, str(temporary), dict(metadata) if metadata else None)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the text metadata of a safetensors file.

    Raises NotFound for a missing file and DataLoss for one that is truncated or not safetensors.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, dict(file.metadata() or {})


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of the safetensors file that `save_tensors` would write."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(contiguous, dict(metadata) if metadata else None)


def tensors_from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the text metadata of the content of a safetensors file. Raises DataLoss."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, {str(key): str(text) for key, text in header.get("__metadata__", {}).items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise DataLoss(f"it is not complete safetensors: {error}") from None


def describe_tensors(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read only the header of a safetensors file: {name: (shape, dtype as safetensors names it)}."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that weights are a file, so far as its path goes. Raises NotFound."""
    name = Path(path).name
    if Path(path).is_dir():
        raise NotFound(f"weights {name!r} is a folder: name the safetensors file in it")
    if not Path(path).is_file():
        raise NotFound(f"there is no weights file {name!r}")


def _opened(path: str | os.PathLike[str]) -> safe_open:
    check_file(path)
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DataLoss(f"{Path(path).name!r} is not a complete safetensors file: {error}") from None


def save_module(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write the state of a module as safetensors."""
    save_tensors(path, module.state_dict())


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a module, which must match its keys, shapes and dtypes exactly.

    Raises SpecMismatch naming the first three differences.
    """
    check_fit(
        {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
        {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()},
        source,
    )
    module.load_state_dict(dict(tensors), strict=True, assign=False)


def check_fit(
    actual: Mapping[str, tuple[tuple[int, ...], object]],
    expected: Mapping[str, tuple[tuple[int, ...], object]],
    source: str,
    owner: str = "expert",
) -> None:
    """Compare shapes and dtypes of tensors with those expected by the `owner`, an expert or a gate.

    Raises SpecMismatch naming the first three differences.
    """
    problems = [f"missing {name!r}" for name in expected if name not in actual]
    problems += [f"unexpected {name!r}" for name in actual if name not in expected]
    for name in expected.keys() & actual.keys():
        if actual[name] != expected[name]:
            (shape, dtype), (want_shape, want_dtype) = actual[name], expected[name]
            problems.append(f"{name!r} is {list(shape)} {dtype}, but the {owner} has {list(want_shape)} {want_dtype}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise SpecMismatch(f"{source} does not fit the {owner}: {'; '.join(sorted(problems)[:3])}{more}")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state by name, without other kinds of state."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def described(tensors: Mapping[str, Tensor]) -> dict[str, Description]:
    """Shape and dtype of each tensor."""
    return {name: (tuple(tensor.shape), torch_name(tensor.dtype)) for name, tensor in tensors.items()}


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of each tensor's bytes, in hexadecimal."""
    return {name: hashlib.sha256(byte_view(tensor)).hexdigest() for name, tensor in tensors.items()}


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, dtypes, shapes and bytes of tensors, sorted by name."""
    return joined_digest(described(tensors), tensor_digests(tensors))


def joined_digest(descriptions: Mapping[str, Description], digests: Mapping[str, str]) -> str:
    """The `tensor_digest` of tensors from their descriptions and the digests of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(descriptions):
        shape, dtype = descriptions[name]
        digest.update(f"{json.dumps(name)} {dtype} {shape} {digests[name]}\n".encode())
    return digest.hexdigest()


def torch_name(dtype: torch.dtype) -> str:
    """A dtype as torch names it: "float32"."""
    return str(dtype).removeprefix("torch.")
