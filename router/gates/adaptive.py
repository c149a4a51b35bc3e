"""Gates that give hard rows more experts than easy ones: threshold and top-p.

Shapes: T rows, E experts, K choices per row (the most that any row of the batch takes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from .linear import LinearGate
from .routing import Routing
from .selection import exact_sigmoid, masked, pick, top


class _Adaptive(LinearGate):
    """Takes the most probable experts of a row, as many as `_keep` allows; `k` (None: no limit) caps their number."""

    def __init__(self, in_features: int, num_experts: int, *, k: int | None, renormalize: bool, bias: bool) -> None:
        super().__init__(in_features, num_experts, k=k, bias=bias)
        self.renormalize = renormalize

    def _probabilities(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.softmax(dim=1)

    def _keep(self, sorted_TK: Tensor) -> Tensor:
        """Bool [T, K]: the probabilities to keep, a prefix of each row; `sorted_TK` is in descending order."""
        raise NotImplementedError

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        scores_TE = masked(scores_TE, mask_TE)
        _, indices_TK = top(scores_TE, k)
        weights_TK = pick(self._probabilities(scores_TE), indices_TK)
        keep_TK = self._keep(weights_TK.detach()) & (indices_TK >= 0)
        keep_TK[:, 0] = True
        longest = int(keep_TK.sum(dim=1).max()) if keep_TK.shape[0] else 1
        keep_TK = keep_TK[:, :longest]
        weights_TK = weights_TK[:, :longest].masked_fill(~keep_TK, 0)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
        return Routing(indices_TK[:, :longest].masked_fill(~keep_TK, -1), weights_TK)


class Threshold(_Adaptive):
    """Every expert with probability at least `threshold`, and always the best one.

    `score="sigmoid"` rates each expert independently, p = sigmoid(h) (the top-any gate of Guo et al. 2024, DynMoE,
    with one threshold for all experts); `score="softmax"` rates it relative to the others, p = softmax(h). Weights are
    p, divided by their sum if `renormalize`. `k` caps the number of experts.

    >>> gate = gates.Threshold(in_features=16, num_experts=3, threshold=0.25, score="softmax")
    >>> gate.select(torch.tensor([[0.5, 0.3, 0.2]]).log()).indices_TK
    tensor([[0, 1]])
    """

    name = "threshold"

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        threshold: float = 0.5,
        *,
        score: str = "sigmoid",
        k: int | None = None,
        renormalize: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, k=k, renormalize=renormalize, bias=bias)
        if score not in ("sigmoid", "softmax") or not 0 < threshold < 1:
            raise ConfigError(
                "score must be 'sigmoid' or 'softmax', and threshold above 0 and below 1; "
                f"got score {score!r} and threshold {threshold}"
            )
        self.threshold = threshold
        self.score = score

    def _probabilities(self, scores_TE: Tensor) -> Tensor:
        return exact_sigmoid(scores_TE) if self.score == "sigmoid" else scores_TE.softmax(dim=1)

    def _keep(self, sorted_TK: Tensor) -> Tensor:
        return sorted_TK >= self.threshold


class TopP(_Adaptive):
    """The fewest top experts whose probabilities, softmax(h), sum to at least `p` (Huang et al. 2024).

    Weights are the probabilities, divided by their sum if `renormalize`. `k` caps the number of experts.

    >>> gate = gates.TopP(in_features=16, num_experts=3, p=0.6)
    >>> gate.select(torch.tensor([[0.5, 0.3, 0.2]]).log()).indices_TK
    tensor([[0, 1]])
    """

    name = "top_p"

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        p: float = 0.5,
        *,
        k: int | None = None,
        renormalize: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, k=k, renormalize=renormalize, bias=bias)
        if not 0 < p <= 1:
            raise ConfigError(f"p is {p}, but must be above 0 and at most 1")
        self.p = p

    def _keep(self, sorted_TK: Tensor) -> Tensor:
        before_TK = sorted_TK.cumsum(dim=1) - sorted_TK
        return before_TK < torch.tensor(self.p, dtype=sorted_TK.dtype)
