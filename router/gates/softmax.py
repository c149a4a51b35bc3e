"""Top-k of linear scores with softmax weights: the gates of Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2, GPT-OSS and Switch.

Shapes: T rows, E experts, K choices per row.
"""

from __future__ import annotations

from torch import Tensor

from ...experts.errors import ConfigError
from .linear import LinearGate
from .routing import Routing
from .selection import check_groups, limit_groups, masked, pick, top


def softmax_top_k(
    scores_TE: Tensor, mask_TE: Tensor | None, k: int, *, renormalize: bool, scale: float = 1.0
) -> Routing:
    """The k best experts with weights scale · softmax(scores), the softmax divided by its sum if `renormalize`.

    The renormalised softmax is computed as the softmax over the chosen scores; the two are equal.
    """
    scores_TE, holes = masked(scores_TE, mask_TE), mask_TE is not None
    values_TK, indices_TK = top(scores_TE, k, holes=holes)
    if renormalize:
        weights_TK = values_TK.softmax(dim=1)
    else:
        weights_TK = (values_TK - scores_TE.logsumexp(dim=1, keepdim=True)).exp()
    return Routing(indices_TK, weights_TK if scale == 1.0 else weights_TK * scale)


def check_softmax(softmax: str, renormalize: bool) -> None:
    """Raise ConfigError for an unknown position of the softmax, or a `renormalize` that would have no effect."""
    if softmax not in ("before", "after"):
        raise ConfigError(f"softmax is {softmax!r}, but must be 'before' or 'after' (selection)")
    if softmax == "after" and not renormalize:
        raise ConfigError(
            "with softmax='after' the weights always sum to one: for renormalize=False use softmax='before'"
        )


class TopK(LinearGate):
    """The k best experts of each row, weighted by softmax.

    With h = x·Wᵀ (+ b) and S the k largest of h:

    * `softmax="after"`: w = scale · softmax of h over S (Shazeer et al. 2017, eq. 3 and 5, without noise; GPT-OSS).
    * `softmax="before"`: w = scale · softmax of h over all experts, kept on S. With `renormalize` it is divided by
      its sum over S, which makes it equal to `"after"` (Mixtral; Qwen3-MoE with `norm_topk_prob`); without, the
      weights sum to at most `scale` (OLMoE, Qwen2-MoE).

    With `groups` > 1 only the `top_groups` groups with the best single expert compete (DeepSeek-V2, §2.2.2).
    Raises ConfigError for arguments that contradict each other.

    >>> gate = gates.TopK(in_features=16, num_experts=4, k=2)
    >>> gate.select(torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    Routing(indices_TK=tensor([[1, 3]]), weights_TK=tensor([[0.7311, 0.2689]]...
    """

    name = "top_k"

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        *,
        softmax: str = "after",
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__(in_features, num_experts, k=k, bias=bias)
        check_softmax(softmax, renormalize)
        check_groups(num_experts, groups, top_groups)
        self.softmax = softmax
        self.renormalize = renormalize
        self.scale = scale
        self.groups = groups
        self.top_groups = top_groups

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        if self.groups == 1:
            return softmax_top_k(scores_TE, mask_TE, k, renormalize=self.renormalize, scale=self.scale)
        scores_TE = masked(scores_TE, mask_TE)
        _, indices_TK = top(limit_groups(scores_TE, self.groups, self.top_groups, best=1), k)
        weights_TK = pick(scores_TE.softmax(dim=1), indices_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        return Routing(indices_TK, weights_TK * self.scale)


class Switch(LinearGate):
    """The single best expert of each row, weighted by its probability p = softmax(h) (Fedus et al. 2021, eq. 1-2).

    >>> gates.Switch(in_features=16, num_experts=4).select(torch.tensor([[0.0, 3.0, 1.0, 2.0]])).indices_TK
    tensor([[1]])
    """

    name = "switch"
    k_per_request = False

    def __init__(self, in_features: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__(in_features, num_experts, k=1, bias=bias)

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=False)
