"""Ready-made experts: feed-forward networks, plain and gated, one at a time or packed for grouped compute.

Shapes: R rows at an expert, N rows of all experts sorted by expert, D features, F hidden features, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError, SpecMismatch
from .grouped import Stack, two_layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
"""Activation functions by name."""


class FeedForward(nn.Module):
    """down(activation(up(x))): rows [R, D] to rows [R, O], with hidden width F; O is D unless `out_features` says more.

    State: `up_proj.weight` [F, D], `down_proj.weight` [O, F], and biases where `bias`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=bias)
        self.down_proj = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x_RD: Tensor) -> Tensor:
        down_RO: Tensor = self.down_proj(self.activation(self.up_proj(x_RD)))
        return down_RO


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)): rows [R, D] to rows [R, D] (GLU variants, Shazeer 2020; SwiGLU with "silu").

    State: `gate_proj.weight` and `up_proj.weight` [F, D], `down_proj.weight` [D, F], and biases where `bias`: the
    names of one expert of a Llama-like checkpoint.
    """

    def __init__(self, in_features: int, hidden_features: int, *, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=bias)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=bias)
        self.down_proj = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x_RD: Tensor) -> Tensor:
        down_RD: Tensor = self.down_proj(self.activation(self.gate_proj(x_RD)) * self.up_proj(x_RD))
        return down_RD


class SigmoidScaled(nn.Module):
    """sigmoid(x·w) · module(x): the shared expert of Qwen2-MoE, scaled by a gate of its own, `scale.weight` [1, D]."""

    def __init__(self, module: nn.Module, in_features: int) -> None:
        super().__init__()
        self.module = module
        self.scale = nn.Linear(in_features, 1, bias=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        scaled_RD: Tensor = self.scale(x_RD).sigmoid() * self.module(x_RD)
        return scaled_RD


class PackedExperts(nn.Module):
    """E gated (or plain) feed-forward experts of equal shape in stacked tensors, as transformers 5 stores them.

    State: `gate_up_proj` [E, 2F, D] (gate first; plain experts: `up_proj` [E, F, D]), `down_proj` [E, D, F]; with
    `bias` also `gate_up_proj_bias` [E, 2F] (or `up_proj_bias` [E, F]) and `down_proj_bias` [E, D]. `transposed` stores
    weights as [E, in, out]; `interleaved` puts gate and up in turns instead of halves; `limit` and `alpha` are the
    clamped SwiGLU of GPT-OSS: (up + 1) · gate · sigmoid(alpha · gate), gate at most `limit`, up within ±`limit`.
    GPT-OSS sets all of these.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
        limit: float | None = None,
        alpha: float = 1.702,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.activation = activation_of(activation)
        self.gated, self.transposed, self.interleaved = gated, transposed, interleaved
        self.limit, self.alpha = limit, alpha
        self._first = "gate_up_proj" if gated else "up_proj"
        self._register(self._first, in_features, (2 if gated else 1) * hidden_features, bias)
        self._register("down_proj", hidden_features, in_features, bias)

    def forward(self, x_ND: Tensor, offsets: Sequence[int]) -> Tensor:
        """Rows [N, D], sorted by expert; those of expert e are offsets[e]:offsets[e + 1]. Returns [N, D].

        Raises SpecMismatch where rows or offsets do not fit.
        """
        if x_ND.dim() != 2 or x_ND.shape[1] != self.in_features or len(offsets) != self.num_experts + 1:
            raise SpecMismatch(
                f"packed experts got rows {tuple(x_ND.shape)} and {len(offsets)} offsets, but need "
                f"[rows, {self.in_features}] and {self.num_experts + 1} offsets"
            )
        return two_layers(x_ND, offsets, self._stack(self._first), self._stack("down_proj"), self._hidden)

    def _hidden(self, up_RF: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(up_RF)
        gate_RF, up_RF = (up_RF[:, ::2], up_RF[:, 1::2]) if self.interleaved else up_RF.chunk(2, dim=1)
        if self.limit is None:
            return _product(self.activation(gate_RF), up_RF)
        gate_RF = gate_RF.clamp(max=self.limit)
        up_RF = up_RF.clamp(min=-self.limit, max=self.limit)
        return (up_RF + 1) * (gate_RF * (gate_RF * self.alpha).sigmoid())

    def _stack(self, name: str) -> Stack:
        return Stack(getattr(self, name), getattr(self, f"{name}_bias", None), self.transposed)

    def _register(self, name: str, inputs: int, outputs: int, bias: bool) -> None:
        shape = (self.num_experts, inputs, outputs) if self.transposed else (self.num_experts, outputs, inputs)
        bound = 1 / math.sqrt(inputs)
        self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(self.num_experts, outputs)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, in the memory of `left` where no gradient needs it."""
    return left * right if torch.is_grad_enabled() else left.mul_(right)


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name. Raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {name!r}, but must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
