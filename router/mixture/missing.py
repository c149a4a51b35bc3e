"""Lost (row, expert) pairs: which ones, their share of the gate weight, and the policy that replaces them.

Shapes: T rows, K choices per row, N pairs of a row and an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import InvalidRequest, Unavailable
from .dispatch import Dispatch

KINDS = ("error", "renormalize", "residual", "fallback")


@dataclass(frozen=True)
class OnMissing:
    """The policy of a layer or request for lost pairs; `expert` is the fallback expert, None for the other kinds."""

    kind: str
    expert: str | None = None

    @classmethod
    def parse(cls, text: str | OnMissing) -> OnMissing:
        """Read `error`, `renormalize`, `residual` or `fallback:<expert>`. Raises InvalidRequest for anything else."""
        if isinstance(text, OnMissing):
            return text
        kind, colon, expert = text.partition(":")
        if kind not in KINDS or bool(colon) != (kind == "fallback") or bool(expert) != (kind == "fallback"):
            raise InvalidRequest(
                f"on_missing is {text!r}, but must be 'error', 'renormalize', 'residual' or 'fallback:<expert>'"
            )
        return cls(kind, expert or None)

    def limit(self, max_lost_mass: float | None) -> float:
        """The largest lost mass of a row: as given, else 1 where an expert stands in for what is lost, and 0.5."""
        if max_lost_mass is not None:
            return max_lost_mass
        return 1.0 if self.kind == "fallback" else 0.5

    def __str__(self) -> str:
        return self.kind if self.expert is None else f"{self.kind}:{self.expert}"


def lost_pairs(handle: Dispatch, outputs_N: Tensor | None, answered_N: Tensor | None = None) -> Tensor | None:
    """Bool [T, K]: the slots of this handle without an answer (`answered_N` False) or with one that is not finite.

    None if nothing is lost. Ignores the pairs of other requests in a merged batch. `outputs_N` None means that every
    answer is finite.
    """
    held_TK = handle.slots_TK >= 0
    slots = handle.slots_TK[held_TK]
    valid = torch.ones_like(slots, dtype=torch.bool) if answered_N is None else answered_N[slots]
    if outputs_N is not None and outputs_N.is_floating_point():
        finite = outputs_N.detach()[slots].isfinite()
        valid = valid & (finite.flatten(1).all(dim=1) if finite.dim() > 1 else finite)
    if valid.all():
        return None
    return torch.zeros_like(held_TK).masked_scatter(held_TK, ~valid)


def lost_mass(handle: Dispatch, weights_TK: Tensor, lost_TK: Tensor) -> Tensor:
    """Float32 [T]: the share of |gate weight| in lost pairs, or the share of pairs if all weights of a row are zero."""
    mass_TK = weights_TK.detach().abs()
    total_T = mass_TK.sum(dim=1)
    by_weight_T = (mass_TK * lost_TK).sum(dim=1) / total_T
    by_count_T = lost_TK.sum(dim=1) / (handle.slots_TK >= 0).sum(dim=1).clamp(min=1)
    return torch.where(total_T > 0, by_weight_T, by_count_T).float()


def check_covered(
    handle: Dispatch,
    lost_TK: Tensor,
    lost_mass_T: Tensor,
    policy: OnMissing,
    max_lost_mass: float | None,
    names: Sequence[str] | None = None,
) -> None:
    """Raise Unavailable if the policy does not cover the loss; the message names pairs, experts and lost mass.

    `names` are those of the experts, in the order of the gate.
    """
    worst, limit = float(lost_mass_T.max()), policy.limit(max_lost_mass)
    experts = sorted({handle.expert_of(slot) for slot in handle.slots_TK[lost_TK].tolist()})
    shown = ", ".join(str(expert) if names is None else names[expert] for expert in experts)
    loss = (
        f"{int(lost_TK.sum())} (row, expert) pairs of {shown} were lost (no answer, NaN or infinity): "
        f"lost mass of the worst row {worst:.3g}"
    )
    if policy.kind == "error":
        raise Unavailable(f"{loss}; on_missing is 'error': retry, or declare another policy")
    if worst > limit:
        raise Unavailable(f"{loss}, above max_lost_mass {limit:.3g}: retry, or raise the limit")
    if policy.kind == "renormalize" and bool(
        (lost_TK == (handle.slots_TK >= 0)).all(dim=1).logical_and(lost_TK.any(dim=1)).any()
    ):
        raise Unavailable(f"{loss}; a row lost all its experts, so nothing is left to renormalize: retry")


def renormalization(weights_TK: Tensor, lost_TK: Tensor) -> Tensor:
    """The factor Σ|w| chosen / Σ|w| answered of each row [T, 1]; 1 for a row without weight.

    Raises Unavailable for a row whose answered pairs all have weight zero.
    """
    chosen_T, answered_T = weights_TK.abs().sum(dim=1), weights_TK.masked_fill(lost_TK, 0).abs().sum(dim=1)
    if ((answered_T == 0) & (chosen_T > 0)).any():
        raise Unavailable("every answered expert of a row has weight zero, so nothing is left to renormalize: retry")
    return torch.where(answered_T > 0, chosen_T / answered_T, 1)[:, None]
