"""Combine the experts' answers into rows: weighted sum, mean, vote or residual. No lost answer goes unreported.

Sums accumulate in float32 (float64 for float64 answers) in ascending expert order, so that a batch of the same
composition gives bit-identical results.

Shapes: T rows, K choices per row, N pairs of a row and an expert; rows may have any trailing shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experts.errors import InvalidRequest, SpecMismatch, Unavailable
from .dispatch import Dispatch
from .missing import OnMissing, check_covered, lost_mass, lost_pairs, renormalization
from .ordered_sum import ordered_sum
from .vote import labels_of, majority

METHODS = ("weighted_sum", "mean", "vote", "residual")
ON_DROPPED = ("zero", "residual")


@dataclass(frozen=True)
class Combined:
    """The combined rows of a batch or of one request.

    `output` [T, ...]. `lost_mass_T` float32: the share of each row's |gate weight| that was in lost pairs.
    `dropped_T` int64 or None: the number of choices that each row lost to capacity.
    `degraded`: a pair was lost or a choice dropped. `lost_TK` bool: the lost pairs, None if there are none.
    """

    output: Tensor
    lost_mass_T: Tensor
    dropped_T: Tensor | None
    degraded: bool
    lost_TK: Tensor | None = None


def combine(
    handle: Dispatch,
    outputs: Tensor,
    *,
    added_up: bool = False,
    answered_N: Tensor | None = None,
    method: str = "weighted_sum",
    on_missing: str | OnMissing = "error",
    max_lost_mass: float | None = None,
    names: Sequence[str] | None = None,
    on_dropped: str = "zero",
    x_T: Tensor | None = None,
    fallback_T: Tensor | None = None,
    shared_T: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Combined:
    """Combine the answers of the experts into rows.

    `outputs` [N, ...] holds the answers in the order of the handle's pairs; entries where `answered_N` (bool [N];
    None = all) is False never reach a result. With `added_up` it holds the sums [T, ...] of the answered pairs of each
    row, weighted as `method` says (not for `vote`). Methods, over the pairs (w, f) of a row:

    * `weighted_sum`: Σ w·f. `residual`: x + Σ w·f, with the rows `x_T`. `mean`: Σ f / number of pairs.
    * `vote`: the class with the most votes, one vote per expert; ties go to the lower class. Integer answers [N, ...]
      are class labels, one vote per position; float answers [N, ..., C] are logits whose argmax is the vote. The
      output is int64 [T, ...].

    `shared_T` [T, ...] (experts that are always on) is added at the end; not for `vote`. A row without an expert is
    zero, or its `x_T` with `on_dropped="residual"`. The output has `out_dtype`, by default the dtype of the answers
    (float32 for integers).

    A pair is lost if it has no answer or its answer is not finite. `on_missing` says what happens then:

    * `error` raises. `renormalize` scales by Σ|w| chosen / Σ|w| answered (mean and vote: only answers count).
    * `residual` replaces w·f by w·x, `fallback:<expert>` by w·`fallback_T`. (In `mean`, x or the fallback row counts
      as an answer; in `vote`, the fallback row votes, and `residual` is rejected.)

    `names` are those of the experts, for messages.

    Raises Unavailable for lost pairs under `error`, for lost mass above `max_lost_mass`, for a row that lost all its
    pairs (under `residual` and `fallback` only the limit applies, since terms remain), for a policy whose rows are not
    available, and for a result that is not finite; InvalidRequest for an unknown method or policy and for a missing
    `x_T`; SpecMismatch for shapes that do not fit.
    """
    policy = OnMissing.parse(on_missing)
    _check(handle, outputs, method, on_dropped, added_up)
    finisher = _Finisher(handle, method, on_dropped, x_T, shared_T, out_dtype or _default_dtype(outputs))

    if answered_N is None and method != "vote":
        total = outputs
        if not added_up:
            term_TK = _term_weights(handle, _gate_weights(handle), method)
            total = ordered_sum(handle, outputs, term_TK, out_dtype=finisher.out_dtype if finisher.only_casts else None)
        combined = finisher.without_loss(total)
        if combined is not None:
            return combined

    weights_TK = _gate_weights(handle)
    lost_TK = lost_pairs(handle, None if added_up else outputs, answered_N)
    nothing_lost_TK = torch.zeros_like(handle.slots_TK, dtype=torch.bool)
    mass_T = lost_mass(handle, weights_TK, nothing_lost_TK if lost_TK is None else lost_TK)
    if lost_TK is not None:
        check_covered(handle, lost_TK, mass_T, policy, max_lost_mass, names)
    substitute_T = _substitute(policy, x_T, fallback_T, needed=lost_TK is not None)
    if method == "vote":
        output = _vote(handle, outputs, nothing_lost_TK if lost_TK is None else lost_TK, policy, substitute_T)
    else:
        term_TK = _term_weights(handle, weights_TK, method)
        survivors = handle if lost_TK is None else handle.without(lost_TK)
        total = outputs if added_up else ordered_sum(survivors, outputs, term_TK)
        output = finisher(total if lost_TK is None else _compensated(total, term_TK, lost_TK, substitute_T))
    if output.is_floating_point() and not _finite(output):
        raise Unavailable(
            "the combined rows are not finite, although every expert's answer is: a shared, residual or fallback row "
            f"is not finite, or the sum overflows {output.dtype} (use a wider out_dtype)"
        )
    return Combined(output, mass_T, handle.dropped_T, lost_TK is not None or finisher.any_dropped, lost_TK)


def _compensated(total_T: Tensor, weights_TK: Tensor, lost_TK: Tensor, substitute_T: Tensor | None) -> Tensor:
    """The sum of the answered pairs, renormalized or with the substitute rows in the place of the lost ones."""
    column = (-1,) + (1,) * (total_T.dim() - 1)
    if substitute_T is None:
        return total_T * renormalization(weights_TK, lost_TK).to(total_T.dtype).view(column)
    if substitute_T.shape != total_T.shape:
        raise SpecMismatch(
            f"rows of shape {tuple(substitute_T.shape)} cannot replace lost answers of shape {tuple(total_T.shape)}"
        )
    lost_weight_T = (weights_TK * lost_TK).sum(dim=1).to(total_T.dtype)
    return torch.where(lost_TK.any(dim=1).view(column), total_T + lost_weight_T.view(column) * substitute_T, total_T)


def _vote(
    handle: Dispatch, outputs_N: Tensor, lost_TK: Tensor, policy: OnMissing, substitute_T: Tensor | None
) -> Tensor:
    held_TK = handle.slots_TK >= 0
    if not held_TK.any(dim=1).all():
        raise Unavailable("a row without an expert has no vote: do not use a capacity limit with 'vote'")
    labels_N = labels_of(outputs_N)
    if labels_N.shape[0] == 0:
        return labels_N.new_zeros((0, *labels_N.shape[1:]))
    labels_TK = labels_N[handle.slots_TK.clamp(min=0)]
    if substitute_T is None:
        return majority(labels_TK, held_TK & ~lost_TK)
    if policy.kind == "residual":
        raise InvalidRequest(
            "on_missing 'residual' has no meaning for 'vote': use 'renormalize' or 'fallback:<expert>'"
        )
    extra = (1,) * (labels_TK.dim() - 2)
    labels_TK = torch.where(lost_TK.view(*lost_TK.shape, *extra), labels_of(substitute_T)[:, None], labels_TK)
    return majority(labels_TK, held_TK)


@dataclass(frozen=True)
class _Finisher:
    """Turns the sum over experts into the output: unrouted rows, residual, shared experts, dtype."""

    handle: Dispatch
    method: str
    on_dropped: str
    x_T: Tensor | None
    shared_T: Tensor | None
    out_dtype: torch.dtype

    @property
    def only_casts(self) -> bool:
        """Whether the output is the sum itself, cast to `out_dtype`."""
        fills_rows = self.on_dropped == "residual" and not self.handle.full
        return self.shared_T is None and self.method != "residual" and not fills_rows

    @property
    def any_dropped(self) -> bool:
        """Whether a choice was dropped."""
        return self.handle.dropped_T is not None and bool(self.handle.dropped_T.any())

    def without_loss(self, total: Tensor) -> Combined | None:
        """The result if no pair is lost; None if it is not finite."""
        # NaN and infinity propagate through every sum: a finite result proves that all answers were finite.
        output = self(total)
        if not _finite(output):
            return None
        zero_T = torch.zeros(self.handle.num_rows, dtype=torch.float32, device=output.device)
        return Combined(output, zero_T, self.handle.dropped_T, self.any_dropped)

    def __call__(self, total: Tensor) -> Tensor:
        if self.method == "residual":
            total = total + _checked_rows(self.x_T, "x_T", "the method 'residual'", total)
        elif self.on_dropped == "residual" and not self.handle.full:
            x_T = _checked_rows(self.x_T, "x_T", "on_dropped 'residual'", total)
            unrouted_T = (self.handle.slots_TK < 0).all(dim=1)
            total = torch.where(unrouted_T.view((-1,) + (1,) * (total.dim() - 1)), x_T.to(total.dtype), total)
        if self.shared_T is not None:
            total = total + _checked_rows(self.shared_T, "shared_T", "shared experts", total)
        return total.to(self.out_dtype)


def _checked_rows(rows_T: Tensor | None, name: str, purpose: str, like: Tensor) -> Tensor:
    if rows_T is None:
        raise InvalidRequest(f"{purpose} needs {name}: pass it")
    if rows_T.shape != like.shape:
        raise SpecMismatch(f"{name} has shape {tuple(rows_T.shape)}, but the combined answers have {tuple(like.shape)}")
    return rows_T


def _substitute(policy: OnMissing, x_T: Tensor | None, fallback_T: Tensor | None, *, needed: bool) -> Tensor | None:
    if not needed or policy.kind not in ("residual", "fallback"):
        return None
    rows_T = x_T if policy.kind == "residual" else fallback_T
    if rows_T is None:
        raise Unavailable(f"experts were lost, and the rows for on_missing {str(policy)!r} are not available: retry")
    return rows_T


def _gate_weights(handle: Dispatch) -> Tensor:
    """The gate weight of every slot [T, K], 0 for empty ones."""
    slots_TK = handle.slots_TK
    if handle.full:
        return handle.weights_N.index_select(0, slots_TK.flatten()).view_as(slots_TK)
    padded_N = F.pad(handle.weights_N, (0, 1))  # the slot -1 reads the zero at the end
    return padded_N[slots_TK]


def _term_weights(handle: Dispatch, weights_TK: Tensor, method: str) -> Tensor:
    if method != "mean":
        return weights_TK
    held_TK = (handle.slots_TK >= 0).to(weights_TK.dtype)
    return held_TK / held_TK.sum(dim=1, keepdim=True).clamp(min=1)


def _check(handle: Dispatch, outputs: Tensor, method: str, on_dropped: str, added_up: bool) -> None:
    if method not in METHODS or on_dropped not in ON_DROPPED:
        raise InvalidRequest(
            f"method must be one of {', '.join(METHODS)}, and on_dropped one of {', '.join(ON_DROPPED)}; "
            f"got method {method!r} and on_dropped {on_dropped!r}"
        )
    if added_up and method == "vote":
        raise InvalidRequest("'vote' needs the answer of every pair, but outputs holds sums")
    expected = handle.num_rows if added_up else handle.num_pairs
    if outputs.dim() == 0 or outputs.shape[0] != expected:
        kind = "rows" if added_up else "pairs"
        raise SpecMismatch(f"outputs have shape {tuple(outputs.shape)}, but the handle has {expected} {kind}")


def _default_dtype(outputs: Tensor) -> torch.dtype:
    return outputs.dtype if outputs.is_floating_point() else torch.float32


def _finite(rows: Tensor) -> bool:
    """Whether all values are finite. Their sum takes one pass; if it is not finite, check every value."""
    rows = rows.detach()
    return math.isfinite(rows.sum().item()) or bool(rows.isfinite().all())
