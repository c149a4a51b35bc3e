"""Pairs whose expert did not answer: which they are, what share of the gate weight they held, what takes their place.

Shapes: T rows, K choices a row, N pairs of a row and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...experts.errors import InvalidRequest, Unavailable
from .dispatch import Dispatch

KINDS = ("error", "renormalize", "residual", "fallback")


@dataclass(frozen=True)
class OnMissing:
    """The declared policy of a layer; `expert` names the fallback expert, and is None for the other kinds."""

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

    def __str__(self) -> str:
        return self.kind if self.expert is None else f"{self.kind}:{self.expert}"


def lost_pairs(handle: Dispatch, outputs_N: Tensor | None, answered_N: Tensor | None = None) -> Tensor | None:
    """Bool [T, K]: the slots of this handle that were not answered (`answered_N` False) or not with finite numbers.

    None where nothing is lost. The pairs of other requests in a merged batch are not looked at. With `outputs_N` None
    all that was answered is finite.
    """
    held_TK = handle.slots_TK >= 0
    slots = handle.slots_TK[held_TK]
    good = torch.ones_like(slots, dtype=torch.bool) if answered_N is None else answered_N[slots]
    if outputs_N is not None and outputs_N.is_floating_point():
        finite = outputs_N.detach()[slots].isfinite()
        good = good & (finite.flatten(1).all(dim=1) if finite.dim() > 1 else finite)
    if good.all():
        return None
    return torch.zeros_like(held_TK).masked_scatter(held_TK, ~good)


def lost_mass(handle: Dispatch, weights_TK: Tensor, lost_TK: Tensor) -> Tensor:
    """Float32 [T]: share of |gate weight| in lost pairs; the share of pairs where a row's weights are all zero."""
    mass_TK = weights_TK.detach().abs()
    total_T = mass_TK.sum(dim=1)
    by_weight_T = (mass_TK * lost_TK).sum(dim=1) / total_T
    by_count_T = lost_TK.sum(dim=1) / (handle.slots_TK >= 0).sum(dim=1).clamp(min=1)
    return torch.where(total_T > 0, by_weight_T, by_count_T).float()


def refuse(handle: Dispatch, lost_TK: Tensor, lost_mass_T: Tensor, policy: OnMissing, max_lost_mass: float) -> None:
    """Raise Unavailable where the policy does not cover the loss; the message names pairs, experts and lost mass."""
    worst = float(lost_mass_T.max())
    experts = sorted({handle.expert_of(slot) for slot in handle.slots_TK[lost_TK].tolist()})
    what = (
        f"{int(lost_TK.sum())} (row, expert) pairs of experts {experts} were lost (no answer, or NaN or infinity): "
        f"lost mass of the worst row {worst:.3g}"
    )
    if policy.kind == "error":
        raise Unavailable(f"{what}; on_missing is 'error': retry, or declare another policy")
    if worst > max_lost_mass:
        raise Unavailable(f"{what}, above max_lost_mass {max_lost_mass:.3g}: retry, or raise the limit")
    if policy.kind == "renormalize" and bool(
        (lost_TK == (handle.slots_TK >= 0)).all(dim=1).logical_and(lost_TK.any(dim=1)).any()
    ):
        raise Unavailable(f"{what}; a row has lost all its experts, nothing is left to renormalize: retry")


def renormalization(weights_TK: Tensor, lost_TK: Tensor) -> Tensor:
    """Σ|w| chosen / Σ|w| answered of each row: [T, 1], 1 where a row has no weight.

    Raises Unavailable where only pairs of weight zero answered.
    """
    chosen_T, answered_T = weights_TK.abs().sum(dim=1), weights_TK.masked_fill(lost_TK, 0).abs().sum(dim=1)
    if ((answered_T == 0) & (chosen_T > 0)).any():
        raise Unavailable("every answered expert of a row has weight zero, nothing is left to renormalize: retry")
    return torch.where(answered_T > 0, chosen_T / answered_T, 1)[:, None]
