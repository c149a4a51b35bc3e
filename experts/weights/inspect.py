"""A weights file as it arrives, of which nothing is believed: size, header, fit, checksum, and every number in it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import DataLoss, FailedPrecondition, NotFound, SpecMismatch, TooLarge
from ..tensors import byte_view
from .files import Description, check_fit, described, joined_digest, torch_name
from .header import Entry, read_header, short

CHUNK = 2**20
"""Bytes that are looked at together; what a look allocates is a small multiple of it."""


@dataclass(frozen=True, kw_only=True)
class ArtefactLimits:
    """What a weights file may be at most: `max_bytes` and `max_header_bytes` in bytes, `max_tensors` by count.

    A header has 100 to 150 bytes for a tensor, so `max_tensors` of them fit into `max_header_bytes`.
    """

    max_bytes: int = 8 * 2**30
    max_tensors: int = 10_000
    max_header_bytes: int = 2 * 2**20


LIMITS = ArtefactLimits()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was found in tensors by looking at all of them.

    `norms` is the L2 norm of each floating tensor, computed in float64; `digests` the sha256 of each tensor's bytes.
    """

    tensors: Mapping[str, Description]
    norms: Mapping[str, float]
    digests: Mapping[str, str]

    @property
    def tensor_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in self.tensors.values())

    @property
    def tensor_digest(self) -> str:
        """The `weights.tensor_digest` of all tensors."""
        return joined_digest(self.tensors, self.digests)


@dataclass(frozen=True, kw_only=True)
class Artefact(Contents):
    """A weights file that passed inspection: its size in bytes, its sha256, and what is in it."""

    path: Path
    sha256: str
    nbytes: int


def inspect_artefact(
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    limits: ArtefactLimits = LIMITS,
    wanted: Mapping[str, Description] | None = None,
    owner: str = "expert",
) -> Artefact:
    """Inspect a safetensors file in one pass, in little memory whatever its size.

    `sha256` is what the sender computed; `wanted` the tensors that it must have, of its `owner`.

    Raises NotFound; TooLarge for a size above a limit; DataLoss for a file that is truncated, malformed or not the one
    that was sent; SpecMismatch naming the first three tensors that do not fit; FailedPrecondition for NaN, infinity or
    all zeros.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise NotFound(f"there is no weights file {name!r}")
    try:
        with Path(path).open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > limits.max_bytes:
                raise TooLarge(
                    f"it has {nbytes} bytes; the limit max_bytes is {limits.max_bytes}: raise it or send a smaller file"
                )
            entries = read_header(file, nbytes, max_bytes=limits.max_header_bytes, max_tensors=limits.max_tensors)
            tensors = {entry.name: (entry.shape, torch_name(entry.dtype)) for entry in entries}
            if wanted is not None:
                check_described(tensors, wanted, owner)
            header = file.tell()
            file.seek(0)
            whole, looks = _pass(file, entries, header)
        if sha256 is not None and whole != sha256.lower():
            raise DataLoss(f"its sha256 is {whole[:12]}..., but the sender's is {short(sha256[:12])}...: send it again")
        norms, digests = _judged(looks)
    except OSError as error:
        raise DataLoss(f"the weights file {name!r} cannot be read: {error.strerror or type(error).__name__}") from None
    except (DataLoss, SpecMismatch, TooLarge, FailedPrecondition) as error:
        raise type(error)(f"weights file {name!r}: {error.message}") from None
    return Artefact(path=Path(path), sha256=whole, nbytes=nbytes, tensors=tensors, norms=norms, digests=digests)


def survey(tensors: Mapping[str, Tensor]) -> Contents:
    """Look at tensors in memory as `inspect_artefact` looks at those in a file.

    Raises FailedPrecondition for NaN, infinity or all zeros.
    """
    looks = {name: _Look(name, tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for part in _parts(tensor):
            looks[name].take(part)
    norms, digests = _judged(looks.values())
    return Contents(tensors=described(tensors), norms=norms, digests=digests)


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The L2 norm of each floating tensor, computed in float64."""
    floating = {name: tensor for name, tensor in tensors.items() if _is_floating(tensor.dtype)}
    return {name: math.hypot(*map(_norm, _parts(tensor))) for name, tensor in floating.items()}


def check_described(given: Mapping[str, Description], wanted: Mapping[str, Description], owner: str = "expert") -> None:
    """Compare tensors with those of the `owner` that is to take them. Raises SpecMismatch naming the first three."""
    try:
        check_fit(given, wanted, "it", owner)
    except SpecMismatch as error:
        raise SpecMismatch(f"{error.message}; write exactly the tensors of the {owner} it replaces") from None


def _pass(file: BinaryIO, entries: Iterable[Entry], header: int) -> tuple[str, list[_Look]]:
    """Read the file once; its sha256, and what was found in each tensor."""
    whole, looks = hashlib.sha256(), []
    buffer = bytearray(CHUNK)
    for part in _chunks(file, header, buffer):
        whole.update(part)
    for entry in entries:
        look = _Look(entry.name, entry.dtype)
        for part in _chunks(file, entry.stop - entry.start, buffer):
            whole.update(part)
            look.take(torch.frombuffer(part, dtype=entry.dtype))
        looks.append(look)
    if file.read(1):
        raise DataLoss("it grew while it was read: send it again")
    return whole.hexdigest(), looks


def _chunks(file: BinaryIO, nbytes: int, buffer: bytearray) -> Iterator[memoryview]:
    """The next `nbytes` bytes of a file; each chunk is valid until the next one is asked for."""
    while nbytes:
        part = memoryview(buffer)[: min(nbytes, len(buffer))]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise DataLoss("it shrank while it was read: send it again")
        yield part
        nbytes -= len(part)


class _Look:
    """What is found in one tensor while its numbers go by."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.floating = _is_floating(dtype)
        self.norm = 0.0
        self.seen = self.nonzero = False
        self.sha256 = hashlib.sha256()

    def take(self, part: Tensor) -> None:
        """Look at the next numbers, in a flat tensor."""
        self.seen = True
        data = byte_view(part)
        self.sha256.update(data)
        if part.dtype == torch.bool and max(data, default=0) > 1:
            raise DataLoss(f"{short(self.name)} has dtype bool but bytes other than 0 and 1; write the file again")
        if not self.floating:
            return
        norm = _norm(part)
        if not math.isfinite(norm) and not _wide(part).isfinite().all():
            raise FailedPrecondition(
                f"{short(self.name)} has NaN or infinite values: the training run diverged; use an earlier checkpoint"
            )
        self.norm = math.hypot(self.norm, norm)
        self.nonzero = self.nonzero or norm > 0 or bool(_wide(part).any())


def _judged(looks: Iterable[_Look]) -> tuple[dict[str, float], dict[str, str]]:
    """Norms and digests of tensors. Raises FailedPrecondition where there are floating numbers, and all are zero."""
    looks = list(looks)
    floating = [look for look in looks if look.floating]
    if any(look.seen for look in floating) and not any(look.nonzero for look in floating):
        raise FailedPrecondition(
            "all its floating-point values are zero: the weights were never filled in; export the trained weights"
        )
    norms = {look.name: look.norm for look in floating}
    return norms, {look.name: look.sha256.hexdigest() for look in looks}


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor in their order, flat and on the CPU, a chunk at a time."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        for part in torch.split(flat, CHUNK // flat.element_size()):
            yield part.cpu()


def _norm(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(part)))


def _wide(part: Tensor) -> Tensor:
    return (torch.view_as_real(part) if part.is_complex() else part).to(torch.float64)


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
