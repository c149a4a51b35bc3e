"""A sparse layer that learns in this process, before it is served: with what its gate's balance is trained by.

Shapes: T rows, D features, E experts.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from expertmesh.experts.modules import FeedForward
from expertmesh.router.mixture.balance import load, load_balance_loss
from expertmesh.router.mixture.local import LocalLayer


class SparseLayer(LocalLayer):
    """Feed-forward experts and their gate; after each call, `balance_loss` and `load_E` are those of its choices."""

    balance_loss: Tensor
    load_E: Tensor

    def forward(self, x: Tensor, *, gate_input: Tensor | None = None, **options: object) -> Tensor:
        """The answers to the rows `x` [T, D]; the gate reads `gate_input` [T, ...], by default the rows."""
        scores_TE = self.gate.scores(x if gate_input is None else gate_input)
        routing = self.gate.select(scores_TE)
        self.balance_loss = load_balance_loss(scores_TE.softmax(dim=1), routing)
        self.load_E = load(routing, self.gate.num_experts)
        return self.with_routing(x, routing).output

    def expert(self, name: str) -> FeedForward:
        """One expert."""
        return cast(FeedForward, self.get_submodule(f"experts.{name}"))
