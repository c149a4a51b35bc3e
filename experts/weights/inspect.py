"""Inspection of an untrusted weights file: size, header, fit, checksum, and every number in it."""

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

from ..errors import DataLoss, FailedPrecondition, SpecMismatch, TooLarge
from ..tensors import byte_view
from .files import Description, check_file, check_fit, described, joined_digest, torch_name
from .header import Entry, read_header, short

CHUNK = 2**20
"""Bytes inspected at a time; inspection allocates a small multiple of it."""


@dataclass(frozen=True, kw_only=True)
class ArtefactLimits:
    """The limits of a weights file: its size, the size of its header, and its number of tensors.

    A header has 100 to 150 bytes per tensor, so `max_tensors` of them fit into `max_header_bytes`.
    """

    max_bytes: int = 8 * 2**30
    max_tensors: int = 10_000
    max_header_bytes: int = 2 * 2**20


LIMITS = ArtefactLimits()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The result of an inspection of tensors.

    `norms` is the L2 norm of each floating tensor, computed in float64; `digests` the sha256 of each tensor's bytes.
    `infinite` names the tensors with infinities, where those are left to whoever knows the module.
    """

    tensors: Mapping[str, Description]
    norms: Mapping[str, float]
    digests: Mapping[str, str]
    infinite: frozenset[str] = frozenset()

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
    """A weights file that passed inspection: its size in bytes, its sha256 and its contents."""

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
    infinities: bool = False,
) -> Artefact:
    """Inspect a safetensors file in one pass, in bounded memory.

    `sha256` is the sender's; `wanted` describes the tensors that its `owner` requires. With `infinities`, tensors that
    have some are named in `Contents.infinite` and not refused, because the module may need them, as masks do.

    Raises NotFound; TooLarge for a size above a limit; DataLoss for a file that is truncated, malformed or differs from
    the one sent; SpecMismatch naming the first three tensors that do not fit; FailedPrecondition for NaN, infinity or
    all zeros.
    """
    name = Path(path).name
    check_file(path)
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
            whole, inspections = _pass(file, entries, header, infinities)
        if sha256 is not None and whole != sha256.lower():
            raise DataLoss(f"its sha256 is {whole[:12]}..., but the sender's is {short(sha256[:12])}...: send it again")
        found = _judged(inspections, tensors)
    except OSError as error:
        raise DataLoss(f"the weights file {name!r} cannot be read: {error.strerror or type(error).__name__}") from None
    except (DataLoss, SpecMismatch, TooLarge, FailedPrecondition) as error:
        raise type(error)(f"weights file {name!r}: {error.message}") from None
    return Artefact(path=Path(path), sha256=whole, nbytes=nbytes, **vars(found))


def survey(tensors: Mapping[str, Tensor], *, infinities: bool = False) -> Contents:
    """Inspect tensors in memory, as `inspect_artefact` does in a file.

    Raises FailedPrecondition for NaN, infinity or all zeros.
    """
    inspections = {name: _Inspection(name, tensor.dtype, infinities) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for part in _parts(tensor):
            inspections[name].take(part)
    return _judged(inspections.values(), described(tensors))


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The L2 norm of each floating tensor, computed in float64."""
    floating = {name: tensor for name, tensor in tensors.items() if _is_floating(tensor.dtype)}
    return {name: math.hypot(*map(_norm, _parts(tensor))) for name, tensor in floating.items()}


def check_described(given: Mapping[str, Description], wanted: Mapping[str, Description], owner: str = "expert") -> None:
    """Compare tensors with those that their `owner` requires. Raises SpecMismatch naming the first three."""
    try:
        check_fit(given, wanted, "it", owner)
    except SpecMismatch as error:
        raise SpecMismatch(f"{error.message}; write exactly the tensors of the {owner} it replaces") from None


def _pass(file: BinaryIO, entries: Iterable[Entry], header: int, infinities: bool) -> tuple[str, list[_Inspection]]:
    """Read the file once; returns its sha256, and an inspection of each tensor."""
    whole, inspections = hashlib.sha256(), []
    buffer = bytearray(CHUNK)
    for part in _chunks(file, header, buffer):
        whole.update(part)
    for entry in entries:
        inspection = _Inspection(entry.name, entry.dtype, infinities)
        for part in _chunks(file, entry.stop - entry.start, buffer):
            whole.update(part)
            inspection.take(torch.frombuffer(part, dtype=entry.dtype))
        inspections.append(inspection)
    if file.read(1):
        raise DataLoss("it grew while it was read: send it again")
    return whole.hexdigest(), inspections


def _chunks(file: BinaryIO, nbytes: int, buffer: bytearray) -> Iterator[memoryview]:
    """Yield the next `nbytes` bytes of a file; each chunk is valid only until the next one."""
    while nbytes:
        part = memoryview(buffer)[: min(nbytes, len(buffer))]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise DataLoss("it shrank while it was read: send it again")
        yield part
        nbytes -= len(part)


class _Inspection:
    """The running inspection of one tensor."""

    def __init__(self, name: str, dtype: torch.dtype, infinities: bool) -> None:
        self.name = name
        self.infinities = infinities
        self.infinite = False
        self.floating = _is_floating(dtype)
        self.norm = 0.0
        self.seen = self.nonzero = False
        self.sha256 = hashlib.sha256()

    def take(self, part: Tensor) -> None:
        """Inspect the next numbers of the tensor, as a flat tensor."""
        self.seen = True
        data = byte_view(part)
        self.sha256.update(data)
        if part.dtype == torch.bool and max(data, default=0) > 1:
            raise DataLoss(f"{short(self.name)} has dtype bool but bytes other than 0 and 1; write the file again")
        if not self.floating:
            return
        norm = _norm(part)
        if not math.isfinite(norm) and not _wide(part).isfinite().all():
            if not self.infinities or bool(_wide(part).isnan().any()):
                raise not_finite(self.name)
            self.infinite = True
        self.norm = math.hypot(self.norm, norm)
        self.nonzero = self.nonzero or norm > 0 or bool(_wide(part).any())


def not_finite(name: str) -> FailedPrecondition:
    """The error for a tensor that holds NaN or infinity where it must not."""
    return FailedPrecondition(
        f"{short(name)} has NaN or infinite values: the training run diverged; use an earlier checkpoint"
    )


def same_infinities(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same infinities in the same places."""
    one, other = _wide(one.detach().cpu()), _wide(other.detach().cpu())
    places = one.isinf()
    return torch.equal(places, other.isinf()) and torch.equal(one[places], other[places])


def _judged(inspections: Iterable[_Inspection], tensors: Mapping[str, Description]) -> Contents:
    """What was found in tensors. Raises FailedPrecondition if there are floating numbers, and all are zero."""
    inspections = list(inspections)
    floating = [inspection for inspection in inspections if inspection.floating]
    if any(inspection.seen for inspection in floating) and not any(inspection.nonzero for inspection in floating):
        raise FailedPrecondition(
            "all its floating-point values are zero: the weights were never filled in; export the trained weights"
        )
    return Contents(
        tensors=tensors,
        norms={inspection.name: inspection.norm for inspection in floating},
        digests={inspection.name: inspection.sha256.hexdigest() for inspection in inspections},
        infinite=frozenset(inspection.name for inspection in floating if inspection.infinite),
    )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor in order, as flat chunks on the CPU."""
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
