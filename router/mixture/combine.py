"""Experts' answers to rows: weighted sum, mean, vote or residual, in a fixed order and never silently wrong.

Sums are accumulated in float32 (float64 for float64 rows) in ascending order of the expert, so that a batch of the
same composition gives the same bits again.

Shapes: T rows, K choices a row, N pairs of a row and an expert; rows may have any trailing shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experts.errors import InvalidRequest, SpecMismatch, Unavailable
from .dispatch import Dispatch
from .missing import OnMissing, lost_mass, lost_pairs, refuse, renormalization
from .ordered_sum import ordered_sum
from .vote import labels_of, majority

METHODS = ("weighted_sum", "mean", "vote", "residual")
ON_DROPPED = ("zero", "residual")


@dataclass(frozen=True)
class Combined:
    """The rows of a batch or of one request.

    `output` [T, ...]. `lost_mass_T` float32: per row, the share of |gate weight| whose expert did not answer.
    `dropped_T` int64 or None: per row, the choices that capacity took away.
    `degraded`: some pair was lost or some choice dropped. `lost_TK` bool: the pairs that were lost, None without any.
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
    max_lost_mass: float = 0.5,
    on_dropped: str = "zero",
    x_T: Tensor | None = None,
    fallback_T: Tensor | None = None,
    shared_T: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Combined:
    """Join the answers of the experts into rows.

    `outputs` [N, ...] holds the answers in the order of the handle's pairs; what it holds where `answered_N` (bool [N];
    None = all) is False never reaches a result. With `added_up` it holds the sums [T, ...] that `method` makes of the
    answered pairs of each row (not for `vote`). Methods, over the pairs (w, f) of a row:

    * `weighted_sum`: Σ w·f. `residual`: x + Σ w·f, with the rows `x_T`. `mean`: Σ f / number of pairs.
    * `vote`: the class with most votes, one vote an expert, of equal counts the lower class. Integer answers [N, ...]
      are class labels and vote at each position; float answers [N, ..., C] are logits whose argmax votes. The output
      is int64 [T, ...].

    `shared_T` [T, ...] (experts that are always on) is added at the end; not for `vote`. A row that no expert takes
    is zero, or its `x_T` with `on_dropped="residual"`. Outputs have `out_dtype`, by default that of the answers.

    A pair is lost if it was not answered or its answer is not finite. Then `on_missing`:

    * `error` refuses. `renormalize`: times Σ|w| chosen / Σ|w| answered (mean and vote: over those that answered).
    * `residual` puts w·x, `fallback:<expert>` w·`fallback_T` in the place of w·f. (In `mean`, x or the fallback's row
      counts as an answer; in `vote`, the fallback's row votes, and `residual` is refused.)

    Raises Unavailable for lost pairs under `error`, for lost mass above `max_lost_mass`, for a row that lost all
    its pairs (under `residual` and `fallback` the limit alone decides, since terms remain), and for a result that is
    not finite; InvalidRequest for an unknown method or policy and for a row tensor that is needed and not given;
    SpecMismatch for shapes that do not fit.
    """
    policy = OnMissing.parse(on_missing)
    _check(handle, outputs, method, on_dropped, added_up)
    finish = _Finish(handle, method, on_dropped, x_T, shared_T, out_dtype or _default_dtype(outputs))

    if answered_N is None and method != "vote":
        total = outputs
        if not added_up:
            term_TK = _term_weights(handle, _gate_weights(handle), method)
            total = ordered_sum(handle, outputs, term_TK, out_dtype=finish.out_dtype if finish.plain else None)
        whole = finish.whole(total)
        if whole is not None:
            return whole

    weights_TK = _gate_weights(handle)
    lost_TK = lost_pairs(handle, None if added_up else outputs, answered_N)
    none_TK = torch.zeros_like(handle.slots_TK, dtype=torch.bool)
    mass_T = lost_mass(handle, weights_TK, none_TK if lost_TK is None else lost_TK)
    if lost_TK is not None:
        refuse(handle, lost_TK, mass_T, policy, max_lost_mass)
    instead_T = _instead(policy, x_T, fallback_T, needed=lost_TK is not None)
    if method == "vote":
        output = _vote(handle, outputs, none_TK if lost_TK is None else lost_TK, policy, instead_T)
    else:
        term_TK = _term_weights(handle, weights_TK, method)
        survivors = handle if lost_TK is None else handle.without(lost_TK)
        total = outputs if added_up else ordered_sum(survivors, outputs, term_TK)
        output = finish(total if lost_TK is None else _compensated(total, term_TK, lost_TK, instead_T))
    if output.is_floating_point() and not _finite(output):
        raise Unavailable(
            "the combined rows are not finite though every expert's answer is: a shared, residual or fallback row is "
            f"not, or the sum overflows {output.dtype} (then ask for a wider out_dtype)"
        )
    return Combined(output, mass_T, handle.dropped_T, lost_TK is not None or finish.dropped, lost_TK)


def _compensated(total_T: Tensor, weights_TK: Tensor, lost_TK: Tensor, instead_T: Tensor | None) -> Tensor:
    """The sum of the answered pairs, with what the policy puts in the place of the lost ones."""
    column = (-1,) + (1,) * (total_T.dim() - 1)
    if instead_T is None:
        return total_T * renormalization(weights_TK, lost_TK).to(total_T.dtype).view(column)
    if instead_T.shape != total_T.shape:
        raise SpecMismatch(f"rows of shape {tuple(instead_T.shape)} cannot stand in for answers {tuple(total_T.shape)}")
    lost_weight_T = (weights_TK * lost_TK).sum(dim=1).to(total_T.dtype)
    return torch.where(lost_TK.any(dim=1).view(column), total_T + lost_weight_T.view(column) * instead_T, total_T)


def _vote(handle: Dispatch, outputs_N: Tensor, lost_TK: Tensor, policy: OnMissing, instead_T: Tensor | None) -> Tensor:
    held_TK = handle.slots_TK >= 0
    if not held_TK.any(dim=1).all():
        raise Unavailable("a row that no expert takes has no vote: use no capacity limit with 'vote'")
    labels_N = labels_of(outputs_N)
    if labels_N.shape[0] == 0:
        return labels_N.new_zeros((0, *labels_N.shape[1:]))
    labels_TK = labels_N[handle.slots_TK.clamp(min=0)]
    if instead_T is None:
        return majority(labels_TK, held_TK & ~lost_TK)
    if policy.kind == "residual":
        raise InvalidRequest(
            "on_missing 'residual' has no meaning for 'vote': use 'renormalize' or 'fallback:<expert>'"
        )
    extra = (1,) * (labels_TK.dim() - 2)
    labels_TK = torch.where(lost_TK.view(*lost_TK.shape, *extra), labels_of(instead_T)[:, None], labels_TK)
    return majority(labels_TK, held_TK)


@dataclass(frozen=True)
class _Finish:
    """From the sum over experts to the row that is answered: unrouted rows, residual, shared experts, dtype."""

    handle: Dispatch
    method: str
    on_dropped: str
    x_T: Tensor | None
    shared_T: Tensor | None
    out_dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether only the dtype is left to be done."""
        passes = self.on_dropped == "residual" and not self.handle.full
        return self.shared_T is None and self.method != "residual" and not passes

    @property
    def dropped(self) -> bool:
        """Whether capacity took a choice away."""
        return self.handle.dropped_T is not None and bool(self.handle.dropped_T.any())

    def whole(self, total: Tensor) -> Combined | None:
        """The rows where nothing is lost; None where they are not finite."""
        # NaN and infinity survive every sum: a finite result proves that all answers were finite.
        output = self(total)
        if not _finite(output):
            return None
        nothing_T = torch.zeros(self.handle.num_rows, dtype=torch.float32, device=output.device)
        return Combined(output, nothing_T, self.handle.dropped_T, self.dropped)

    def __call__(self, total: Tensor) -> Tensor:
        if self.method == "residual":
            total = total + _given(self.x_T, "x_T", "the method 'residual'", total)
        elif self.on_dropped == "residual" and not self.handle.full:
            x_T = _given(self.x_T, "x_T", "on_dropped 'residual'", total)
            unrouted_T = (self.handle.slots_TK < 0).all(dim=1)
            total = torch.where(unrouted_T.view((-1,) + (1,) * (total.dim() - 1)), x_T.to(total.dtype), total)
        if self.shared_T is not None:
            total = total + _given(self.shared_T, "shared_T", "shared experts", total)
        return total.to(self.out_dtype)


def _given(rows_T: Tensor | None, name: str, purpose: str, like: Tensor) -> Tensor:
    if rows_T is None:
        raise InvalidRequest(f"{purpose} needs {name}, but it was not given")
    if rows_T.shape != like.shape:
        raise SpecMismatch(f"{name} has shape {tuple(rows_T.shape)}, but the answers make rows {tuple(like.shape)}")
    return rows_T


def _instead(policy: OnMissing, x_T: Tensor | None, fallback_T: Tensor | None, *, needed: bool) -> Tensor | None:
    if not needed or policy.kind not in ("residual", "fallback"):
        return None
    rows_T = x_T if policy.kind == "residual" else fallback_T
    if rows_T is None:
        raise Unavailable(f"experts were lost and on_missing is {str(policy)!r}, but its rows are not there: retry")
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
            f"method is {method!r} and on_dropped {on_dropped!r}, but must be one of {METHODS} and of {ON_DROPPED}"
        )
    if added_up and method == "vote":
        raise InvalidRequest("votes are counted, not added up: 'vote' needs the answer of every pair")
    wanted = handle.num_rows if added_up else handle.num_pairs
    if outputs.dim() == 0 or outputs.shape[0] != wanted:
        kind = "rows" if added_up else "pairs"
        raise SpecMismatch(f"outputs have shape {tuple(outputs.shape)}, but the handle has {wanted} {kind}")


def _default_dtype(outputs: Tensor) -> torch.dtype:
    return outputs.dtype if outputs.is_floating_point() else torch.float32


def _finite(rows: Tensor) -> bool:
    """Whether all numbers are finite: by their sum, which is one pass, and exactly where the sum overflows."""
    rows = rows.detach()
    return math.isfinite(rows.sum().item()) or bool(rows.isfinite().all())
