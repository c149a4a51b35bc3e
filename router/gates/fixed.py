"""A gate with fixed weights, the same for every row.

Shapes: T rows, E experts, K choices per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from .base import Gate
from .routing import Routing
from .selection import masked, pick, top


class Fixed(Gate):
    """Sends every row to every expert (or to the k of largest |weight|) with the given weights, not normalised.

    It ignores the features. Weights may be negative; they must be finite.

    >>> gates.Fixed([0.5, 0.25])(torch.zeros(1, 16)).weights_TK
    tensor([[0.5000, 0.2500]])
    """

    name = "fixed"
    weights_E: Tensor

    def __init__(self, weights: Sequence[float], *, k: int | None = None) -> None:
        super().__init__(len(weights), k=k)
        self.register_buffer("weights_E", torch.tensor([float(weight) for weight in weights]))
        if not self.weights_E.isfinite().all():
            raise ConfigError(f"fixed weights must be finite, not {list(weights)}")

    def scores(self, x: Tensor) -> Tensor:
        return self.weights_E.to(x.device).expand(x.shape[0], self.num_experts)

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        _, indices_TK = top(masked(scores_TE.abs(), mask_TE), k)
        return Routing(indices_TK, pick(scores_TE, indices_TK))

    def config(self) -> dict[str, Any]:
        return {"weights": self.weights_E.tolist(), "k": self.k}
