"""The interface of every gate: scores, selection, configuration, weights file.

Shapes: T rows, D features, E experts, K choices per row.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...experts.errors import ConfigError, DataLoss, InvalidRequest, PermissionDenied, SpecMismatch
from ...experts.weights.files import load_tensors, save_tensors
from .routing import Routing
from .selection import checked_mask, checked_scores

AnyGate = TypeVar("AnyGate", bound="Gate")


class Gate(nn.Module):
    """Scores the experts for each row and selects some of them.

    A subclass defines `name` (its name in YAML), `scores` and `_select`. `forward` is `select(scores(x))`.
    `per_row` is True if the choice for a row depends on its own scores alone, `k_per_request` if a request may set k.

    >>> gate = gates.build("top_k", in_features=16, num_experts=4, k=2)
    >>> gate(torch.zeros(3, 16)).indices_TK.tolist()  # equal scores: the lower experts
    [[0, 1], [0, 1], [0, 1]]
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 1
    """Part of a gate's version: raise it whenever the gate computes something else than before."""

    per_row: ClassVar[bool] = True
    k_per_request: ClassVar[bool] = True

    def __init__(self, num_experts: int, *, in_features: int | None = None, k: int | None = None) -> None:
        super().__init__()
        if num_experts < 1 or (in_features is not None and in_features < 1):
            raise ConfigError(f"num_experts and in_features must be at least 1, not {num_experts} and {in_features}")
        self.num_experts = num_experts
        self.in_features = in_features
        self.k = None if k is None else self._checked_k(k)

    def scores(self, x: Tensor) -> Tensor:
        """Score every expert for every row.

        `x` is [T, ...]. Most gates flatten its trailing dimensions to D and cast it to the dtype of their parameters.
        Returns [T, E], float32 (float64 for a float64 gate). Raises SpecMismatch if D is not `in_features`.
        """
        raise NotImplementedError

    def select(self, scores_TE: Tensor, *, mask_TE: Tensor | None = None, k: int | None = None) -> Routing:
        """Choose experts from scores [T, E].

        `mask_TE` (bool, [T, E] or [E]) is True where an expert is allowed; it is applied before selection, as if
        the other experts did not exist. `k` overrides the gate's own number of choices for this call. A row with
        fewer than K allowed experts gets all of them. Ties go to the lower expert index.

        Raises InvalidRequest for scores that are not finite, a row with no allowed expert, or a `k` that is out of
        range or not supported; SpecMismatch for wrong shapes.
        """
        if k is not None and not self.k_per_request:
            raise InvalidRequest(f"gate {self.name!r} does not take k (top_k) per request: leave it out")
        scores_TE = checked_scores(scores_TE, self.num_experts)
        k = self.k if k is None else self._checked_k(k)
        return self._select(scores_TE, checked_mask(mask_TE, scores_TE), k or self.num_experts)

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        raise NotImplementedError

    def forward(self, x: Tensor, *, mask_TE: Tensor | None = None, k: int | None = None) -> Routing:
        """Route the rows of `x` [T, ...]: `select(scores(x))`."""
        return self.select(self.scores(x), mask_TE=mask_TE, k=k)

    def config(self) -> dict[str, Any]:
        """The arguments (JSON types) that rebuild this gate, without its tensors: `build(gate.name, **config)`.

        By default the attributes named like the gate's arguments.
        """
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tensors to a safetensors file, with the gate's name and configuration in its metadata."""
        tensors = {key: value.detach() for key, value in self.state_dict().items()}
        save_tensors(path, tensors, {"gate": self.name, "config": json.dumps(self.config(), sort_keys=True)})

    @classmethod
    def load(cls: type[AnyGate], path: str | PathLike[str], *, factories: Collection[str] | None = None) -> AnyGate:
        """Build the gate that `save` wrote. `Gate.load` accepts any kind, `TopK.load` only its own.

        Code that a gate imports must be among `factories`, unless these are None: for a file that is trusted.

        Raises NotFound for a missing file, DataLoss for one that is damaged or whose tensors do not fit its
        configuration, SpecMismatch for one that holds no gate or another kind of gate, and PermissionDenied.
        """
        tensors, metadata = load_tensors(path)
        file = Path(path).name
        kind = _kinds(cls).get(metadata.get("gate", ""))
        if kind is None:
            raise SpecMismatch(
                f"file {file!r} holds a gate of kind {metadata.get('gate')!r}, but must hold one of "
                f"{', '.join(sorted(_kinds(cls)))}"
            )
        try:
            config = json.loads(metadata.get("config", ""))
        except ValueError as error:
            raise DataLoss(f"file {file!r}: the gate configuration in its metadata is not JSON ({error})") from error
        if factories is not None and isinstance(config, dict):
            for factory in kind.imports(config):
                if factory not in factories:
                    named = str(factory)[:64]
                    raise PermissionDenied(f"file {file!r}: {named!r} is not in allowed_factories of the cluster")
        try:
            gate = kind(**config)
            gate.load_state_dict(tensors, assign=True)
        except ConfigError:
            raise
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise DataLoss(f"file {file!r}: its tensors do not fit its configuration ({error})") from error
        return gate

    @classmethod
    def imports(cls, config: Mapping[str, Any]) -> Iterable[object]:
        """The import strings of the code that a gate of this configuration would run."""
        return ()

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())

    def _checked_k(self, k: int) -> int:
        if not 1 <= k <= self.num_experts:
            raise InvalidRequest(
                f"k is {k}, but must be between 1 and {self.num_experts}, the number of experts of gate {self.name!r}"
            )
        return k

    def _features(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` as [T, D] in `dtype`. Raises SpecMismatch for rows of the wrong width."""
        if x.dim() == 0:
            raise SpecMismatch(f"the input of gate {self.name!r} is a scalar: pass rows of shape [rows, ...]")
        x_TD = x.flatten(1) if x.dim() > 1 else x[:, None]
        if self.in_features is not None and x_TD.shape[1] != self.in_features:
            raise SpecMismatch(
                f"rows have {x_TD.shape[1]} features (shape {tuple(x.shape)}), but gate {self.name!r} takes "
                f"{self.in_features}"
            )
        return x_TD.to(dtype)


def _kinds(cls: type[AnyGate]) -> dict[str, type[AnyGate]]:
    """Every kind of gate that is `cls` or a subclass of it, by name."""
    kinds = {cls.name: cls} if "name" in vars(cls) else {}
    for child in cls.__subclasses__():
        kinds |= _kinds(child)
    return kinds
