"""Compares a staged version with the one it replaces: norms of tensors, tensors read back, and golden probe rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..construct.factory import RowFunction
from ..errors import ConfigError, DataLoss, ExpertMeshError, FailedPrecondition, Unavailable
from ..spec import ANY, FLOATING, TensorSpec, is_number
from ..tensors import dtype_name, torch_dtype
from ..weights.files import tensor_digests
from ..weights.header import short
from ..weights.inspect import not_finite, same_infinities

log = logging.getLogger(__name__)

GOLDEN_SEED = 0
PATIENCE_SECONDS = 2.0
"""How long a version that serves may compute other rows before it is compared without."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much a new version may differ from the one it replaces.

    `max_norm_ratio` bounds the ratio of each tensor's L2 norm to the old one, both ways; `allow_norm` disables that.
    `max_drift` bounds the relative L2 distance of the answers to `probe_rows` golden rows; without it the drift is
    only reported. `allow_unverified` accepts an expert that could not be run, because no rows are known that it takes.
    Raises ConfigError for invalid bounds.
    """

    max_norm_ratio: float = 1000.0
    allow_norm: bool = False
    max_drift: float | None = None
    probe_rows: int = 8
    allow_unverified: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.max_norm_ratio) or not self.max_norm_ratio >= 1:
            raise ConfigError(f"max_norm_ratio must be a number of at least 1, not {self.max_norm_ratio!r}")
        for name in ("allow_norm", "allow_unverified"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.max_drift is not None and (not is_number(self.max_drift) or not self.max_drift >= 0):
            raise ConfigError(f"max_drift must be a number of at least 0, or left out, not {self.max_drift!r}")
        if type(self.probe_rows) is not int or not 1 <= self.probe_rows <= 4096:
            raise ConfigError(f"probe_rows must be a whole number of 1 to 4096, not {self.probe_rows!r}")


def check_norms(new: Mapping[str, float], old: Mapping[str, float], policy: Policy) -> None:
    """Compare the L2 norms of tensors that both versions have; a tensor that was zero may take any norm.

    Raises FailedPrecondition naming the tensor with the largest ratio.
    """
    ratios = {name: _ratio(new[name], old[name]) for name in new.keys() & old.keys()}
    if policy.allow_norm or not ratios:
        return
    name = max(sorted(ratios), key=ratios.__getitem__)
    if ratios[name] > policy.max_norm_ratio:
        raise FailedPrecondition(
            f"the norm of {short(name)} changed from {old[name]:.4g} to {new[name]:.4g}, a factor of "
            f"{ratios[name]:.4g}; max_norm_ratio is {policy.max_norm_ratio:g}: check the training, or set allow_norm"
        )


def check_applied(staged: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
    """Compare tensors read back from a staged module with the digests of those sent.

    Raises DataLoss naming the first three that were not applied.
    """
    loaded = {name: tensor for name, tensor in staged.items() if not tensor.is_meta}
    actual = tensor_digests({name: loaded[name] for name in digests if name in loaded})
    wrong = sorted({name for name in digests if actual.get(name) != digests[name]} | (staged.keys() - digests.keys()))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataLoss(
            f"the staged module does not hold what was sent for {', '.join(map(short, wrong[:3]))}{more}: "
            "it was not applied or holds uninitialised memory; fix the module's loading code (load_state_dict, hooks)"
        )


def check_infinities(
    names: Collection[str], tensors: Mapping[str, Tensor], module: nn.Module, old: nn.Module | None
) -> None:
    """Check the tensors with infinities against `module`, as constructed, and the one that it replaces.

    Buffers may have them, as masks do, in the places where one of both has the same; parameters never.
    Raises FailedPrecondition.
    """
    buffers = [dict(known.named_buffers()) for known in (module, old) if known is not None]
    for name in sorted(names):
        if not any(name in known and same_infinities(tensors[name], known[name]) for known in buffers):
            raise not_finite(name)


def golden_rows(spec: TensorSpec, n: int, seed: int = GOLDEN_SEED) -> Tensor | None:
    """Rows [n, ...] to probe an expert with, the same in every process; None if the spec has no shape.

    Floating rows are drawn from N(0, 1), integers from {0, 1}, valid indices of any table with two entries.
    """
    if spec.shape is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = (n, *spec.shape), spec.dtype or "float32"
    if dtype in FLOATING:
        return torch.randn(shape, generator=generator).to(torch_dtype(dtype))
    return torch.randint(0, 2, shape, generator=generator).to(torch_dtype(dtype))


def probe_drift(new: RowFunction, old: RowFunction, rows: Tensor, output: TensorSpec = ANY) -> float:
    """The relative L2 distance of two experts' answers to the same rows; infinite if only the old answers are all zero.

    Rows that the old expert does not answer with finite numbers do not count. Raises FailedPrecondition if the new
    expert raises, answers with NaN or infinity, or its shape or dtype differs from its declaration, `output` or the old
    expert; also if there is no row to compare.
    """
    answer = probe(new, rows, output)
    try:
        before = _answer(old, rows)
    except Unavailable:
        raise
    except ExpertMeshError as error:
        raise FailedPrecondition(f"the serving version cannot be compared: {error.message}") from error
    _check_rows(answer, TensorSpec(tuple(before.shape[1:]), dtype_name(before.dtype)), "the version it replaces")
    comparable = finite_rows(before)
    if not comparable.any():
        raise FailedPrecondition(
            "the serving version answers none of the probe rows with finite numbers, so drift cannot be measured: "
            "declare input specs that fit, or swap without max_drift"
        )
    broken = int((comparable & ~finite_rows(answer)).sum())
    if broken:
        raise FailedPrecondition(
            f"the new version answers {broken} of {len(rows)} probe rows with NaN or infinity, where the old one does "
            "not: check the training run, and the weights' dtype for overflow"
        )
    return distance(answer[comparable], before[comparable])


def probe(function: RowFunction, rows: Tensor, output: TensorSpec = ANY) -> Tensor:
    """The answer of an expert to probe rows, on the CPU.

    Raises FailedPrecondition if it raises, or its shape or dtype differs from its declaration or `output`; Unavailable
    if it computes other rows all the while.
    """
    answer = _answer(function, rows)
    _check_rows(answer, function.expert.output, "its declaration")
    _check_rows(answer, output, "the layer")
    return answer


def distance(new: Tensor, old: Tensor) -> float:
    """The L2 norm of the difference over that of the old, in float64; infinite if only the old is zero."""
    scale = float(torch.linalg.vector_norm(old.double()))
    moved = float(torch.linalg.vector_norm(new.double() - old.double()))
    return moved / scale if scale else (math.inf if moved else 0.0)


def check_drift(drift: float | None, policy: Policy) -> None:
    """Compare a drift with its bound, if any. Raises FailedPrecondition if it is larger, or unknown."""
    if policy.max_drift is None:
        return
    if drift is None:
        raise FailedPrecondition(
            "max_drift is set, but drift cannot be measured: declare the expert's input shape, or leave max_drift out"
        )
    if not drift <= policy.max_drift:
        raise FailedPrecondition(
            f"its answers to {policy.probe_rows} probe rows differ by {drift:.4g} (relative L2); max_drift is "
            f"{policy.max_drift:g}: check the training run, or raise max_drift if the change is intended"
        )


def _answer(function: RowFunction, rows: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            return function(rows.clone(), PATIENCE_SECONDS).cpu()
    except (MemoryError, torch.OutOfMemoryError, Unavailable):
        raise
    except ExpertMeshError as error:
        raise FailedPrecondition(f"it fails on probe rows: {error.message}") from error
    except (Exception, SystemExit) as error:  # an expert is user code and may raise anything
        log.exception("an expert raised on probe rows")
        raise FailedPrecondition(
            f"it raised {type(error).__name__} on probe rows; see the log of its replica, and fix the expert"
        ) from error


def _check_rows(answer: Tensor, wanted: TensorSpec, whose: str) -> None:
    answered = TensorSpec(tuple(answer.shape[1:]), dtype_name(answer.dtype))
    if not answered.agrees(wanted):
        raise FailedPrecondition(
            f"it answers probe rows with {answered}, but {whose} has {wanted}: swap in one that fits"
        )


def finite_rows(answer: Tensor) -> Tensor:
    """Bool [n]: which rows [n, ...] hold no NaN and no infinity."""
    return answer.reshape(len(answer), -1).isfinite().all(dim=1)


def _ratio(new: float, old: float) -> float:
    """The ratio of the larger norm to the smaller one; 1 if the old is zero, infinite if only the new is."""
    if old == 0 or new == old:
        return 1.0
    if new == 0 or not math.isfinite(new) or not math.isfinite(old):
        return math.inf
    return max(new / old, old / new)
