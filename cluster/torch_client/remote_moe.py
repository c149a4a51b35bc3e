"""A layer of a cluster as a module of torch: its gate is here and learns, its experts are elsewhere, and may too.

Shapes: T rows, K choices per row, N pairs of a row and an expert; rows may have any trailing shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...experts.errors import ConfigError, ExpertMeshError, InvalidRequest
from ...experts.tensors import from_wire, to_wire
from ...experts.wire import WireTensor
from ...router.gates import Gate, Routing
from ...router.mixture.balance import balanced_bias, load, load_balance_loss, z_loss
from ...router.mixture.capacity import Capacity
from ...router.mixture.dispatch import Dispatch, dispatch
from ..client.methods import BlockingMethods
from ..client.training.frozen import ServingPasses
from ..client.training.options import Passed
from ..client.training.session import TrainingSession
from ..client.training.updates import Part

SEEDS = 1 << 62
METHODS = ("weighted_sum", "mean", "residual")


class RemoteMoE(nn.Module):
    """y = Σ wᵢ·fᵢ(x) with the experts of a layer of a cluster; `backward()` works, over a client or an attached router.

    `gate` is a local module that maps rows to a `Routing`, such as one of `expertmesh.gates`: its parameters are those
    of this module. Without one, pass `indices` and `weights` to each call. With a `session` the candidates of that
    session answer, in training mode or not as this module is, and get gradients, which its `step()` applies; without
    one, what serves answers, and only rows and weights get gradients.

    `combine` is "weighted_sum", "mean" or "residual", and `capacity` limits the rows of an expert; both are by default
    those of the layer, whose shared experts are always added. With `on_missing="leave_out"` (that of the session, if
    there is one) an expert that does not answer is left out, and the weights of its rows are scaled up to their sum.

    After each call, `load` is the number of choices of each expert, int64 [E]; `routing` the choices; `aux_loss` the
    load-balance loss of the gate's scores (1 at perfect balance), to be added with a small factor to yours; `z_loss`
    its z-loss; `left_out` the errors of experts that were left out, by id.

    Raises ConfigError where gate and layer do not fit together.

    Example:
        moe = RemoteMoE(client, "news", gate=gates.TopK(16, 8, k=2), session=session)
        loss = F.cross_entropy(moe(x), y) + 0.01 * moe.aux_loss
        loss.backward()
    """

    def __init__(
        self,
        connection: BlockingMethods,
        layer: str,
        *,
        gate: nn.Module | None = None,
        session: TrainingSession | None = None,
        combine: str | None = None,
        capacity: Capacity | None = None,
        on_missing: str = "error",
    ) -> None:
        super().__init__()
        if session is not None and session.layer != layer:
            raise ConfigError(f"the session trains layer {session.layer}, not {layer}")
        self.gate = gate
        self.layer = layer
        self.session = session
        self._serving = ServingPasses(connection, layer, on_missing)
        described = self._serving.describe()
        self.experts: tuple[str, ...] = tuple(described["experts"])
        self.shared: tuple[str, ...] = tuple(described["shared"])
        declared = described["capacity"]
        self.capacity = Capacity(**declared) if capacity is None and declared else capacity
        self.combine = described["combine"] if combine is None else combine
        self._residual_for_dropped = described["on_dropped"] == "residual"
        if self.combine not in METHODS:
            raise ConfigError(
                f"layer {layer} combines by {self.combine!r}, which has no gradient: train with combine= one of "
                f"{', '.join(METHODS)}"
            )
        chosen = getattr(gate, "num_experts", len(self.experts))
        if chosen != len(self.experts):
            raise ConfigError(f"the gate chooses among {chosen} experts, but layer {layer} has {len(self.experts)}")
        if session is not None and (missing := {*self.experts, *self.shared} - set(session.experts)):
            raise ConfigError(f"the session does not train {min(missing)}: open it for all experts of the layer")
        self.load = torch.zeros(len(self.experts), dtype=torch.int64)
        self._answered: Tensor | None = None
        self._load_since = torch.zeros(len(self.experts), dtype=torch.int64)
        self.routing: Routing | None = None
        self.left_out: Mapping[str, ExpertMeshError] = {}
        self._scores_TE: Tensor | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse."""
        raise TypeError(
            "a RemoteMoE cannot be copied or pickled: its experts are in a cluster. Keep the state_dict() of the "
            "module, which has the gate, and make the experts durable with session.save()"
        )

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, experts={len(self.experts)}, combine={self.combine!r}"

    def forward(
        self,
        x: Tensor,
        *,
        gate_input: Tensor | None = None,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The rows y [T, ...] for the rows `x` [T, ...].

        The gate reads `gate_input` [T, ...], by default `x`; `indices` int64 [T, K] (-1 for none) and `weights` [T, K]
        take its place. Raises the errors of a call, and InvalidRequest for rows or a routing that do not fit.
        """
        if not x.ndim:
            raise InvalidRequest("x must have a first dimension, the rows: pass a single row as x[None]")
        routing = self._routed(x if gate_input is None else gate_input, indices, weights)
        if routing.indices_TK.shape[0] != x.shape[0]:
            raise InvalidRequest(f"the routing has {routing.indices_TK.shape[0]} rows, but x has {x.shape[0]}")
        if self.capacity is not None:
            routing = self.capacity.apply(routing, len(self.experts))
        self.routing, self.load = routing, load(routing, len(self.experts))
        handle = dispatch(routing, len(self.experts))
        if self.training:
            self._load_since += self.load.cpu()
        parts, weights_N = self._pairs(handle)
        call = _Call(self._door(), parts, self._answered)
        y = _Passes.apply(call, self._anchor(), x, handle.rows_N, weights_N)  # type: ignore[no-untyped-call]
        self.left_out = call.left_out
        self._answered = y.detach()[:0]
        return self._with_shared(self._finished(y, x, handle, call), x)

    @property
    def aux_loss(self) -> Tensor:
        """The load-balance loss of the last call (Fedus et al. 2021, eq. 4-6, without α), a scalar.

        Raises InvalidRequest before the first call, or without a gate that has scores.
        """
        if self._scores_TE is None or self.routing is None:
            raise InvalidRequest("there is no balance loss: call the module first, with a gate that has scores")
        return load_balance_loss(self._scores_TE.softmax(dim=1), self.routing)

    @property
    def z_loss(self) -> Tensor:
        """The z-loss of the last call (Zoph et al. 2022, eq. 5), a scalar. Raises InvalidRequest as `aux_loss`."""
        if self._scores_TE is None:
            raise InvalidRequest("there is no z-loss: call the module first, with a gate that has scores")
        return z_loss(self._scores_TE)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3) -> None:
        """Move the gate's expert bias by the load since the last update: loss-free balancing (Wang et al. 2024).

        Call it after each step. Raises InvalidRequest for a gate without such a bias.
        """
        bias = getattr(self.gate, "expert_bias", None)
        if not isinstance(bias, Tensor):
            raise InvalidRequest("the gate has no expert_bias: gates.Sigmoid has one")
        bias.copy_(balanced_bias(bias, self._load_since.to(bias.device), rate))
        self._load_since.zero_()

    def _routed(self, features: Tensor, indices: Tensor | None, weights: Tensor | None) -> Routing:
        self._scores_TE = None
        if indices is not None and weights is not None:
            if indices.shape != weights.shape or indices.ndim != 2:
                raise InvalidRequest(
                    f"indices and weights must both be [T, K], not {list(indices.shape)} and {list(weights.shape)}"
                )
            return Routing(indices, weights)
        if self.gate is None or indices is not None or weights is not None:
            raise InvalidRequest("pass both indices and weights, or give the module a gate")
        if not isinstance(self.gate, Gate):
            found = self.gate(features)
            if not isinstance(found, Routing):
                raise ConfigError(
                    f"the gate returned a {type(found).__name__}, not a Routing of indices and weights: take one of "
                    "expertmesh.gates, or return expertmesh.gates.Routing(indices, weights)"
                )
            return found
        self._scores_TE = self.gate.scores(features)
        return self.gate.select(self._scores_TE)

    def _pairs(self, handle: Dispatch) -> tuple[list[Part], Tensor]:
        """The parts of the routed experts, and the factor of each answer [N]."""
        offsets = handle.offsets
        parts: list[Part] = [
            (id, "", offsets[e], offsets[e + 1], 0) for e, id in enumerate(self.experts) if offsets[e] < offsets[e + 1]
        ]
        weights_N = handle.weights_N
        if self.combine == "mean":
            pairs_T = torch.bincount(handle.rows_N, minlength=handle.num_rows)
            weights_N = pairs_T[handle.rows_N].to(weights_N.dtype).reciprocal()
        return parts, weights_N

    def _with_shared(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the answers of the shared experts, none of which may be left out."""
        count = len(x)
        if not self.shared or not count:
            return y
        parts: list[Part] = [(id, "", at * count, (at + 1) * count, 0) for at, id in enumerate(self.shared)]
        index_N = torch.arange(count, device=x.device).repeat(len(parts))
        call = _Call(self._door(), parts)
        added: Tensor = _Passes.apply(call, self._anchor(), x, index_N, y.new_ones(len(index_N)))  # type: ignore[no-untyped-call]
        for error in call.left_out.values():
            raise error
        return y + added

    def _finished(self, y: Tensor, x: Tensor, handle: Dispatch, call: _Call) -> Tensor:
        column = (-1,) + (1,) * (y.ndim - 1)
        if call.left_out and handle.num_pairs:
            lost = [part for part in call.parts if part[0] in call.left_out]
            answered_N = torch.ones(handle.num_pairs, device=y.device)
            for _, _, start, stop, _ in lost:
                answered_N[start:stop] = 0
            factors_N = handle.weights_N if self.combine != "mean" else torch.ones_like(handle.weights_N)
            whole_T = _per_row(factors_N.abs(), handle)
            kept_T = _per_row(factors_N.abs() * answered_N, handle)
            scale_T = torch.where(kept_T > 0, whole_T / kept_T.clamp(min=1e-30), torch.ones_like(kept_T))
            y = y * scale_T.view(column).to(y.dtype)
        if self.combine == "residual":
            y = x.to(y.dtype) + y
        if self._residual_for_dropped:
            empty_T = torch.bincount(handle.rows_N, minlength=handle.num_rows) == 0
            y = torch.where(empty_T.view(column), x.to(y.dtype), y)  # it has no answer
        return y

    def _anchor(self) -> Tensor:
        """What has a gradient where candidates have parameters, so that torch asks for their backward pass."""
        return torch.zeros((), requires_grad=self.session is not None)

    def _door(self) -> _Door:
        if self.session is not None:
            return _SessionDoor(self.session, self.training)
        return _ServingDoor(self._serving)


class _Door:
    """One forward pass, and its backward pass, which gives gradients of the rows if `of_rows`."""

    def forward(self, parts: list[Part], tensors: dict[str, WireTensor], *, keep: bool, of_rows: bool) -> Passed:
        raise NotImplementedError

    def backward(self, parts: list[Part], tensors: dict[str, WireTensor], *, of_rows: bool) -> Passed:
        raise NotImplementedError


class _SessionDoor(_Door):
    def __init__(self, session: TrainingSession, training: bool) -> None:
        self._session, self._training = session, training
        drawn = session.new_seed()
        self._seed = int(torch.randint(SEEDS, ())) if drawn is None else drawn  # as a Dropout here would draw it
        self._step = session.step_count + 1

    def forward(self, parts: list[Part], tensors: dict[str, WireTensor], *, keep: bool, of_rows: bool) -> Passed:
        options = {"training": self._training, "keep": keep, "of_rows": of_rows}
        return self._session.forward(parts, tensors, self._seed, **options)

    def backward(self, parts: list[Part], tensors: dict[str, WireTensor], *, of_rows: bool) -> Passed:
        training = self._training
        return self._session.backward(parts, tensors, self._seed, self._step, training=training, of_rows=of_rows)


class _ServingDoor(_Door):
    def __init__(self, serving: ServingPasses) -> None:
        self._serving = serving
        self._versions: dict[str, str] = {}

    def forward(self, parts: list[Part], tensors: dict[str, WireTensor], *, keep: bool, of_rows: bool) -> Passed:
        passed, self._versions = self._serving.forward(parts, tensors)
        return passed

    def backward(self, parts: list[Part], tensors: dict[str, WireTensor], *, of_rows: bool) -> Passed:
        named = [(id, self._versions[id], start, stop, number) for id, _, start, stop, number in parts]
        return self._serving.backward(named, tensors)


@dataclass
class _Call:
    """A call of the module: its parts, and what became of them; `like` has rows like those of an earlier answer."""

    door: _Door
    parts: list[Part]
    like: Tensor | None = None
    differentiated: bool = field(default_factory=torch.is_grad_enabled)
    left_out: dict[str, ExpertMeshError] = field(default_factory=dict)


class _Passes(torch.autograd.Function):
    """Σ w·f(x) [T, ...] over the parts of a call, computed elsewhere in both directions."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, x: Tensor, index_N: Tensor, weights_N: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, index_N, weights_N)
        if not call.parts:
            like = x if call.like is None else call.like
            return torch.zeros((len(x), *like.shape[1:]), dtype=like.dtype, device=x.device)
        keep, of_rows = call.differentiated and any(ctx.needs_input_grad), ctx.needs_input_grad[2]
        wired = _wired(rows=x, index=index_N, weights=weights_N)
        passed = call.door.forward(call.parts, wired, keep=keep, of_rows=of_rows)
        call.left_out.update(passed.left_out)
        if "outputs" not in passed.tensors:
            raise next(iter(passed.left_out.values()))
        return from_wire(passed.tensors["outputs"]).clone().to(x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients_T: Tensor) -> tuple[None, None, Tensor | None, None, Tensor | None]:
        x, index_N, weights_N = ctx.saved_tensors
        call: _Call = ctx.call
        parts = [part for part in call.parts if part[0] not in call.left_out]
        if not parts:
            return None, None, torch.zeros_like(x), None, torch.zeros_like(weights_N)
        tensors = _wired(rows=x, index=index_N, weights=weights_N, gradients=gradients_T)
        of_rows = ctx.needs_input_grad[2]
        found = call.door.backward(parts, tensors, of_rows=of_rows).tensors
        rows = from_wire(found["rows"]).to(x.device, x.dtype) if of_rows and "rows" in found else None
        return None, None, rows, None, from_wire(found["weights"]).to(weights_N.device, weights_N.dtype)


def _wired(**tensors: Tensor) -> dict[str, WireTensor]:
    return {name: to_wire(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}


def _per_row(values_N: Tensor, handle: Dispatch) -> Tensor:
    return values_N.new_zeros(handle.num_rows).index_add(0, handle.rows_N, values_N)
