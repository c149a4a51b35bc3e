"""Balance: statistics and losses that keep a gate from sending every row to the same few experts.

Shapes: T rows, E experts, K choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import InvalidRequest
from ..gates.routing import Routing


def load(routing: Routing, num_experts: int) -> Tensor:
    """The number of choices of each expert, int64 [E]."""
    return torch.bincount(routing.indices_TK.flatten() + 1, minlength=num_experts + 1)[1:]


def importance(routing: Routing, num_experts: int) -> Tensor:
    """The sum of the gate weights of each expert [E]; differentiable (Shazeer et al. 2017, eq. 6)."""
    weights_TK = routing.weights_TK
    experts = routing.indices_TK.clamp(min=0).flatten()
    return weights_TK.new_zeros(num_experts).index_add(0, experts, weights_TK.flatten())


def expected_load(clean_TE: Tensor, noisy_TE: Tensor, noise_TE: Tensor, k: int) -> Tensor:
    """A smooth estimate of the load of each expert [E] under noisy top-k (Shazeer et al. 2017, eq. 8-10).

    The probability that an expert is among the k best when its own noise is redrawn and that of the others is kept:
    Φ((clean - k-th best of the other noisy scores) / noise scale), summed over rows. All inputs are [T, E].
    Raises InvalidRequest unless `k` is at least 1 and below the number of experts.
    """
    num_experts = noisy_TE.shape[1]
    if not 1 <= k < num_experts:
        raise InvalidRequest(f"k is {k}, but must be between 1 and {num_experts - 1} for {num_experts} experts")
    best = noisy_TE.topk(k + 1, dim=1).values
    inside_T1, border_T1 = best[:, k - 1 : k], best[:, k : k + 1]
    others_TE = torch.where(noisy_TE >= inside_T1, border_T1, inside_T1)
    chance_TE: Tensor = torch.special.ndtr((clean_TE - others_TE) / noise_TE)
    return chance_TE.sum(dim=0)


def squared_variation(amounts_E: Tensor) -> Tensor:
    """(standard deviation / mean)², the loss on importance or load (Shazeer et al. 2017, eq. 7 and 11), a scalar.

    Zero for a single expert, and if all amounts are zero. Uses the population variance.
    """
    return amounts_E.float().var(correction=0) / amounts_E.float().mean().square().clamp(min=1e-10)


def load_balance_loss(probabilities_TE: Tensor, routing: Routing) -> Tensor:
    """E · Σ f·P over the experts, a scalar of 1 at perfect balance (Fedus et al. 2021, eq. 4-6, without α).

    f is an expert's share of all choices (T·K if none is empty; eq. 5 for K = 1, other implementations do not divide
    by K), P its mean probability over rows (eq. 6). `probabilities_TE` is the softmax over all scores; the gradient
    flows through it only.
    """
    num_experts = probabilities_TE.shape[1]
    counts_E = load(routing, num_experts).to(probabilities_TE.dtype)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return num_experts * (share_E * probabilities_TE.mean(dim=0)).sum()


def z_loss(scores_TE: Tensor) -> Tensor:
    """The mean over rows of (log Σ exp scores)², a scalar; it keeps scores small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return scores_TE.logsumexp(dim=1).square().mean()


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float = 1e-3) -> Tensor:
    """The expert bias after one update of loss-free balancing: b + rate · sign(mean load - load).

    Source: Wang et al. 2024, algorithm 1; DeepSeek-V3, §2.1.2. `load_E` is the `load` of a whole training batch.
    """
    load_E = load_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()
