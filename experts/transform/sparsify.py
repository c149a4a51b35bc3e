"""Sparsify an expert: set weights to zero at random, by magnitude, or N of every M, and measure what that brings."""

from __future__ import annotations

import copy
import math
import os
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..errors import ConfigError, SpecMismatch
from ..weights.files import save_module
from .measure import answers, median_seconds, output_error
from .report import Change, Report

KINDS = ("random", "magnitude", "threshold")
INDEX_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SparsifyReport(Report):
    """What was set to zero, and what it changes, before and after.

    `zeros` and `elements` count the pruned tensors, `zeros_by_tensor` each of them. Sizes are in bytes:
    `file_bytes` of the safetensors file, which stores zeros like any value; `compressed_bytes` of the same file after
    zlib; `sparse_bytes` if the pruned tensors were stored as CSR with 32-bit indices and the others as they are, which
    no swap takes. `seconds` is the median time of a call on the probe rows with the dense kernels that serve it;
    `relative_l2` and `max_abs` are those of `OutputError` on these rows. All three are None without rows.
    """

    kind: str
    scope: str
    elements: int
    zeros: Change
    file_bytes: Change
    compressed_bytes: Change
    sparse_bytes: Change
    seconds: Change | None = None
    relative_l2: float | None = None
    max_abs: float | None = None
    zeros_by_tensor: Mapping[str, Change] = field(default_factory=dict)


class Threshold(prune.BasePruningMethod):
    """Prunes every value whose magnitude is at most `threshold`."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * (t.abs() > self.threshold)


class KeepNOfM(prune.BasePruningMethod):
    """Keeps the `n` values of largest magnitude of every `m` neighbours along `dim` (2:4: Mishra et al. 2021)."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, n: int, m: int, dim: int) -> None:
        self.n, self.m, self.dim = n, m, dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        moved = t.abs().movedim(self.dim, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, self.m)
        kept = torch.zeros_like(groups).scatter(-1, groups.topk(self.n, dim=-1).indices, 1)
        return default_mask * kept.flatten(-2).movedim(-1, self.dim)


def sparsify(
    module: nn.Module,
    kind: str,
    *,
    amount: float | None = None,
    threshold: float | None = None,
    tensors: Sequence[str] | None = None,
    scope: str = "tensor",
    dim: int = -1,
    rows: Tensor | None = None,
    repeats: int = 20,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, SparsifyReport]:
    """A copy of a module with weights set to zero, and the report; the state keeps its names, shapes and dtypes.

    Kinds: "random" and "magnitude" set the share `amount` (0 to 1) to zero, at random or the smallest; "threshold" sets
    to zero what is at most `threshold` in magnitude; "2:4" keeps the 2 largest of every 4 along `dim`, by default the
    inputs of a linear layer (-2 for stacks stored as [E, in, out]). `tensors` are names of parameters, by default all
    floating-point ones of two or more dimensions. The share holds for each tensor, or with `scope="model"` for all
    together. `rows` [T, ...] are probed for error and speed, each call timed `repeats` times. With `path` the result is
    written as a safetensors file that a swap takes.

    Raises ConfigError for an unknown kind, options that the kind does not take or that are out of range, and names
    that are not there; SpecMismatch for weights that are not finite or that N:M does not divide.
    """
    method = _method(kind, amount, threshold, dim, scope)
    sparse = copy.deepcopy(module)
    chosen = _chosen(sparse, tensors)
    for name, parameter in chosen.items():
        _check(name, parameter, method)
    before = {name: _zeros(parameter) for name, parameter in chosen.items()}
    sparse_before = _sparse_bytes(sparse, chosen)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _prune(list(chosen.values()), method, together=scope == "model")
    after = {name: _zeros(parameter) for name, parameter in chosen.items()}
    if path is not None:
        save_module(path, sparse)
    (file_before, packed_before), (file_after, packed_after) = _file_bytes(module), _file_bytes(sparse)
    report = SparsifyReport(
        kind=f"{kind} {amount if threshold is None else threshold}" if ":" not in kind else kind,
        scope=scope,
        elements=sum(parameter.numel() for parameter in chosen.values()),
        zeros=Change(sum(before.values()), sum(after.values())),
        file_bytes=Change(file_before, file_after),
        compressed_bytes=Change(packed_before, packed_after),
        sparse_bytes=Change(sparse_before, _sparse_bytes(sparse, chosen)),
        zeros_by_tensor={name: Change(before[name], after[name]) for name in chosen},
    )
    return sparse, report if rows is None else _probed(report, module, sparse, rows, repeats)


def _method(kind: str, amount: float | None, threshold: float | None, dim: int, scope: str) -> prune.BasePruningMethod:
    found = re.fullmatch(r"(\d+):(\d+)", kind)
    if kind not in KINDS and found is None:
        raise ConfigError(f'kind is {kind!r}, but must be one of {", ".join(KINDS)}, or N:M as in "2:4"')
    if scope not in ("tensor", "model"):
        raise ConfigError(f"scope is {scope!r}, but must be 'tensor' or 'model'")
    wants_amount, wants_threshold = kind in ("random", "magnitude"), kind == "threshold"
    if (amount is not None) != wants_amount or (threshold is not None) != wants_threshold:
        wanted = "amount" if wants_amount else "threshold" if wants_threshold else "neither amount nor threshold"
        raise ConfigError(f"kind {kind!r} takes {wanted}; got amount={amount} and threshold={threshold}")
    if found is not None:
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise ConfigError(
                f'kind is {kind!r}, but N:M keeps N of every M: N must be at least 1 and below M, as "2:4"'
            )
        return KeepNOfM(n, m, dim)
    if threshold is not None:
        if not 0 <= threshold < math.inf:
            raise ConfigError(f"threshold is {threshold}, but must be a finite magnitude of 0 or more")
        return Threshold(threshold)
    if amount is None or not 0 <= amount <= 1:
        raise ConfigError(f"amount is {amount}, but must be a share between 0 and 1")
    return (prune.RandomUnstructured if kind == "random" else prune.L1Unstructured)(float(amount))


def _chosen(module: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    everything = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    chosen = {n: p for n, p in everything.items() if (p.dim() >= 2 if names is None else n in names)}
    missing = [name for name in names or () if name not in everything]
    if missing or not chosen:
        wrong = f"there is no parameter {missing[0]!r}" if missing else "no parameter of two or more dimensions"
        raise ConfigError(
            f"nothing to sparsify in {type(module).__name__}: {wrong}; its floating-point parameters are "
            f"{', '.join(everything) or 'none'}"
        )
    return chosen


def _check(name: str, tensor: Tensor, method: prune.BasePruningMethod) -> None:
    if not tensor.isfinite().all():
        raise SpecMismatch(f"parameter {name!r} has NaN or infinite values: mend it before it is sparsified")
    if isinstance(method, KeepNOfM):
        fits = -tensor.dim() <= method.dim < tensor.dim() and tensor.shape[method.dim] % method.m == 0
        if not fits:
            raise SpecMismatch(
                f"parameter {name!r} has shape {list(tensor.shape)}, but {method.n}:{method.m} needs dimension "
                f"{method.dim} to be a multiple of {method.m}: name other tensors, or another dim"
            )


def _prune(tensors: Sequence[Tensor], method: prune.BasePruningMethod, *, together: bool) -> None:
    """Set to zero in place; `together`: the tensors as one, for methods that compare over all values."""
    if together and not isinstance(method, KeepNOfM):
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        kept = torch.split(_mask(flat, method), [tensor.numel() for tensor in tensors])
        masks = [mask.view_as(tensor) for mask, tensor in zip(kept, tensors, strict=True)]
    else:
        masks = [_mask(tensor, method) for tensor in tensors]
    for tensor, mask in zip(tensors, masks, strict=True):
        tensor.masked_fill_(mask == 0, 0)


def _mask(tensor: Tensor, method: prune.BasePruningMethod) -> Tensor:
    mask: Tensor = method.compute_mask(tensor, torch.ones_like(tensor))  # type: ignore[no-untyped-call]
    return mask


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def _sparse_bytes(module: nn.Module, chosen: Mapping[str, Tensor]) -> int:
    """The bytes of a state whose chosen tensors are CSR matrices [all leading dimensions, last dimension]."""
    total = 0
    for name, tensor in module.state_dict().items():
        if name in chosen:
            filled, leading = tensor.numel() - _zeros(tensor), math.prod(tensor.shape[:-1])
            total += filled * (tensor.element_size() + INDEX_BYTES) + (leading + 1) * INDEX_BYTES
        elif isinstance(tensor, Tensor):
            total += tensor.numel() * tensor.element_size()
    return total


def _file_bytes(module: nn.Module) -> tuple[int, int]:
    """The size of a module's weights file, as it is and compressed by zlib."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        file = Path(folder) / "weights.safetensors"
        save_module(file, module)
        packer, packed = zlib.compressobj(), 0
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                packed += len(packer.compress(block))
        return file.stat().st_size, packed + len(packer.flush())


def _probed(report: SparsifyReport, module: nn.Module, sparse: nn.Module, rows: Tensor, repeats: int) -> SparsifyReport:
    """The report with the error and the speed on probe rows."""
    error = output_error(answers(module, rows), answers(sparse, rows))
    before, after = median_seconds([lambda: answers(module, rows), lambda: answers(sparse, rows)], repeats)
    return replace(report, seconds=Change(before, after), relative_l2=error.relative_l2, max_abs=error.max_abs)
