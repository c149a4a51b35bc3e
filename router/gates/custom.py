"""A gate around any function that returns scores.

Shapes: T rows, E experts, K choices a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...experts.construct.factory import locate
from ...experts.errors import InvalidRequest, SpecMismatch
from .base import Gate
from .routing import Routing
from .softmax import check_softmax, softmax_top_k


class Custom(Gate):
    """Top-k with softmax, as in `TopK`, over the scores that `scorer` returns for the rows [T, ...] as they are.

    `scorer` is a module or function, or an import string "module:attribute" of one; with `args` or `kwargs`, or where
    it names a class, it is called with them once and returns the scorer. Only the import string can be written to a
    configuration. `in_features` may be left out. An import string is code: take it from trusted places alone.

    Raises ConfigError where the import fails.
    """

    name = "custom"

    def __init__(
        self,
        scorer: str | Callable[[Tensor], Tensor],
        num_experts: int,
        k: int = 2,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        in_features: int | None = None,
        softmax: str = "after",
        renormalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(num_experts, in_features=in_features, k=k)
        check_softmax(softmax, renormalize)
        self.factory = scorer if isinstance(scorer, str) else None
        self.args, self.kwargs = list(args), dict(kwargs or {})
        found: Any = locate(scorer) if isinstance(scorer, str) else scorer
        self.scorer = found(*self.args, **self.kwargs) if isinstance(found, type) or self.args or self.kwargs else found
        self.softmax = softmax
        self.renormalize = renormalize
        self.scale = scale

    def scores(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        if parameter is not None and x.is_floating_point():
            x = x.to(parameter.dtype)
        scores_TE = self.scorer(x)
        if not isinstance(scores_TE, Tensor) or scores_TE.shape != (x.shape[0], self.num_experts):
            got = tuple(scores_TE.shape) if isinstance(scores_TE, Tensor) else type(scores_TE).__name__
            raise SpecMismatch(f"the custom scorer returned {got}, but must return {(x.shape[0], self.num_experts)}")
        return scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=self.renormalize, scale=self.scale)

    def config(self) -> dict[str, Any]:
        if self.factory is None:
            raise InvalidRequest("a custom gate of a live object has no configuration: give an import string")
        return super().config() | {"scorer": self.factory}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, k={self.k}, scorer={self.factory or type(self.scorer).__name__!r}"
