"""A whole layer in one process: gate, dispatch, experts, combine. It is the reference for every distributed path.

Shapes: T rows, E experts, N pairs of a row and an expert; rows may have any trailing shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...experts.errors import ConfigError, SpecMismatch
from ...experts.modules import PackedExperts
from ..gates import Gate, Routing
from .capacity import Capacity
from .combine import Combined, combine
from .dispatch import Dispatch, dispatch
from .missing import OnMissing, lost_pairs

RowsFunction = Callable[[Tensor], Tensor]


class LocalLayer(nn.Module):
    """y = Σ wᵢ·fᵢ(x) with experts in this process: any mix of modules and functions, or `PackedExperts`.

    `experts` is in the order of the gate's indices; a mapping names them for `on_missing="fallback:<name>"` (in a
    sequence the names are "0", "1", ...). `shared` is always on and added outside the gate. `method` and the arguments
    after it are those of `combine`. Raises ConfigError if the number of experts is not that of the gate.
    """

    def __init__(
        self,
        gate: Gate,
        experts: PackedExperts | Sequence[RowsFunction] | Mapping[str, RowsFunction],
        *,
        shared: nn.Module | None = None,
        capacity: Capacity | None = None,
        method: str = "weighted_sum",
        on_missing: str = "error",
        max_lost_mass: float | None = None,
        on_dropped: str = "zero",
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts: PackedExperts | nn.ModuleDict
        if isinstance(experts, PackedExperts):
            self.experts, self.names = experts, tuple(str(index) for index in range(experts.num_experts))
            self.functions: tuple[RowsFunction, ...] = ()
        else:
            named = experts if isinstance(experts, Mapping) else {str(i): f for i, f in enumerate(experts)}
            self.experts = nn.ModuleDict({name: f for name, f in named.items() if isinstance(f, nn.Module)})
            self.names, self.functions = tuple(named), tuple(named.values())
        if len(self.names) != gate.num_experts:
            raise ConfigError(f"the gate chooses among {gate.num_experts} experts, but {len(self.names)} are given")
        self.shared = shared
        self.capacity = capacity
        self.method = method
        self.on_missing = OnMissing.parse(on_missing)
        self.max_lost_mass = max_lost_mass
        self.on_dropped = on_dropped

    def forward(self, x: Tensor, *, mask_TE: Tensor | None = None, k: int | None = None) -> Tensor:
        """Compute the rows y [T, ...] from the rows `x` [T, ...]; `mask_TE` and `k` are those of `Gate.select`."""
        return self.answer(x, mask_TE=mask_TE, k=k).output

    def answer(
        self,
        x: Tensor,
        *,
        gate_input: Tensor | None = None,
        mask_TE: Tensor | None = None,
        k: int | None = None,
        on_missing: str | None = None,
    ) -> Combined:
        """Compute the rows, with what was lost and dropped. The gate reads `gate_input` [T, ...], by default `x`.

        Raises what `Gate.select` and `combine` raise.
        """
        routing = self.gate(x if gate_input is None else gate_input, mask_TE=mask_TE, k=k)
        return self.with_routing(x, routing, on_missing=on_missing)

    def with_routing(self, x: Tensor, routing: Routing, *, on_missing: str | None = None) -> Combined:
        """Compute the rows from an existing routing."""
        if self.capacity is not None:
            routing = self.capacity.apply(routing, self.gate.num_experts)
        handle = dispatch(routing, self.gate.num_experts)
        outputs_N = self.compute(x, handle)
        policy = self.on_missing if on_missing is None else OnMissing.parse(on_missing)
        return combine(
            handle,
            outputs_N,
            method=self.method,
            on_missing=policy,
            max_lost_mass=self.max_lost_mass,
            names=self.names,
            on_dropped=self.on_dropped,
            x_T=x,
            fallback_T=self._fallback(x, handle, outputs_N, policy),
            shared_T=None if self.shared is None else self.shared(x),
            out_dtype=None,
        )

    def compute(self, x: Tensor, handle: Dispatch) -> Tensor:
        """The experts' answers [N, ...] to their rows. Raises SpecMismatch if their shapes differ."""
        rows_N = x.index_select(0, handle.rows_N)
        if isinstance(self.experts, PackedExperts):
            return self.experts(rows_N, handle.offsets)  # type: ignore[no-any-return]
        used = [e for e in range(len(self.functions)) if handle.offsets[e] < handle.offsets[e + 1]]
        parts = [self.functions[e](rows_N[handle.pairs(e)]) for e in used]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = {self.names[e]: tuple(part.shape) for e, part in zip(used, parts, strict=True)}
            raise SpecMismatch(f"the experts' answers differ in shape and cannot be combined: {shapes}")
        return torch.cat(parts) if parts else rows_N

    def _fallback(self, x: Tensor, handle: Dispatch, outputs_N: Tensor, policy: OnMissing) -> Tensor | None:
        if policy.expert is None or lost_pairs(handle, outputs_N) is None:
            return None
        if policy.expert not in self.names:
            raise ConfigError(f"the fallback expert {policy.expert!r} is not one of {', '.join(self.names)}")
        index = self.names.index(policy.expert)
        if not isinstance(self.experts, PackedExperts):
            return self.functions[index](x)
        offsets = [0] * (index + 1) + [x.shape[0]] * (len(self.names) - index)
        return self.experts(x, offsets)  # type: ignore[no-any-return]
