"""A gate that wraps any function that returns scores.

Shapes: T rows, E experts, K choices per row.
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
    """Top-k with softmax, as in `TopK`, over the scores [T, E] that `scorer` returns for the rows [T, ...].

    The rows keep their shape; floating-point rows are cast to the dtype of the scorer's parameters, if it has any.
    `scorer` is a module or function, or an import string "module:attribute". If it is a class, or if there are `args`
    or `kwargs`, it is called with them once to make the scorer. A configuration can hold only an import string.
    `in_features` is optional. An import string runs code: accept it from trusted sources only.

    Raises ConfigError if the import fails.

    >>> gate = gates.Custom("torch.nn:Linear", num_experts=4, k=1, args=[16, 4])
    >>> gate(torch.zeros(3, 16)).indices_TK.shape
    torch.Size([3, 1])
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
        target: Any = locate(scorer) if isinstance(scorer, str) else scorer
        is_factory = isinstance(target, type) or self.args or self.kwargs
        self.scorer = target(*self.args, **self.kwargs) if is_factory else target
        self.softmax = softmax
        self.renormalize = renormalize
        self.scale = scale

    def scores(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        if parameter is not None and x.is_floating_point():
            x = x.to(parameter.dtype)
        scores_TE = self.scorer(x)
        if not isinstance(scores_TE, Tensor) or scores_TE.shape != (x.shape[0], self.num_experts):
            returned = tuple(scores_TE.shape) if isinstance(scores_TE, Tensor) else type(scores_TE).__name__
            raise SpecMismatch(
                f"the custom scorer returned {returned}, but must return scores of shape "
                f"{(x.shape[0], self.num_experts)}"
            )
        return scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        return softmax_top_k(scores_TE, mask_TE, k, renormalize=self.renormalize, scale=self.scale)

    def config(self) -> dict[str, Any]:
        if self.factory is None:
            raise InvalidRequest(
                "a custom gate around a live object has no configuration: pass its scorer as an import string"
            )
        return super().config() | {"scorer": self.factory}

    @classmethod
    def imports(cls, config: Mapping[str, Any]) -> list[object]:
        return [config.get("scorer")]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, k={self.k}, scorer={self.factory or type(self.scorer).__name__!r}"
