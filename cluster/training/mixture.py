"""The experts that a trainer trains: modules of this process, or candidates of a cluster's session.

Shapes: T rows, K choices per row.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...experts.construct.factory import build
from ...experts.errors import ConfigError, DataLoss
from ...experts.spec import Expert
from ...experts.training.optimizer import build_optimizer
from ...experts.training.optimizer_state import restore, state_of
from ...experts.weights.files import tensors_from_bytes, tensors_of, tensors_to_bytes
from ...router.gates.routing import Routing
from ...router.mixture.dispatch import dispatch
from ..client.training.session import TrainingSession
from ..torch_client.remote_moe import RemoteMoE

Write = Callable[[bytes], None]
"""Writes the content of a checkpoint."""


class Mixture(Protocol):
    """What a trainer asks of experts: their weighted answers, with gradients, and steps."""

    names: tuple[str, ...]

    def __call__(self, x: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers, [T, ...]; a choice of -1 is none."""

    def step(self, lr: float) -> None:
        """Update the experts with the gradients since the last step, at a learning rate."""

    def forget(self) -> None:
        """Drop the gradients since the last step."""

    def train(self, training: bool) -> None:
        """Whether dropout and the like are on."""

    def save(self, caller: bytes) -> None:
        """Make the state durable, with what the trainer needs to go on."""


class LocalMixture:
    """Experts in this process, whose checkpoint `write` writes."""

    def __init__(
        self, experts: Mapping[str, nn.Module], optimizer: str, arguments: Mapping[str, Any], write: Write
    ) -> None:
        """Raises ConfigError for an optimizer that cannot be had."""
        self.names = tuple(experts)
        self.experts = nn.ModuleDict(dict(experts))
        self.modules = list(experts.values())
        learning = [parameter for parameter in self.experts.parameters() if parameter.requires_grad]
        self._optimizer = build_optimizer(optimizer, learning, arguments) if learning else None
        self._write = write

    @classmethod
    def of(
        cls, layer: str, experts: Mapping[str, Expert], optimizer: str, arguments: Mapping[str, Any], write: Write
    ) -> LocalMixture:
        """Build the experts of a layer, as a replica does. Raises ConfigError for one that is no torch module."""
        modules = {}
        for name, expert in experts.items():
            function = build(expert, id=f"{layer}/{name}")
            if function.module is None:
                raise ConfigError(f"{layer}/{name} is not a torch module: only modules have parameters to train")
            modules[name] = module = copy.deepcopy(function.module)
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and key not in function.frozen)
        return cls(modules, optimizer, arguments, write)

    def __call__(self, x: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers."""
        handle = dispatch(Routing(indices_TK, weights_TK), len(self.names))
        parts = [handle.pairs(e) for e in range(len(self.names))]
        answers = [self.modules[e](x[handle.rows_N[own]]) for e, own in enumerate(parts) if own.start < own.stop]
        if not answers:
            return x.new_zeros(x.shape)
        answers_N = torch.cat(answers)
        weights_N = handle.weights_N.to(answers_N.dtype).reshape(-1, *(1,) * (answers_N.ndim - 1))
        total: Tensor = answers_N.new_zeros(len(x), *answers_N.shape[1:]).index_add(
            0, handle.rows_N, answers_N * weights_N
        )
        return total

    def step(self, lr: float) -> None:
        """Update the experts."""
        if self._optimizer is None:
            raise ConfigError("the experts have no parameters to train: train the gate alone")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.experts.zero_grad()

    def train(self, training: bool) -> None:
        """Whether dropout and the like are on."""
        self.experts.train(training)

    def save(self, caller: bytes) -> None:
        """Write the checkpoint."""
        tensors, document = ({}, {}) if self._optimizer is None else state_of(self._optimizer)
        tensors |= {f"experts.{name}": tensor for name, tensor in tensors_of(self.experts).items()}
        self._write(
            tensors_to_bytes(
                {**tensors, "caller": torch.frombuffer(bytearray(caller), dtype=torch.uint8)},
                {"optimizer": json.dumps(document)},
            )
        )

    def restore(self, saved: bytes) -> bytes:
        """Go on from a checkpoint; returns what the trainer saved. Raises DataLoss or SpecMismatch."""
        tensors, metadata = tensors_from_bytes(saved)
        try:
            own = {name.removeprefix("experts."): t for name, t in tensors.items() if name.startswith("experts.")}
            self.experts.load_state_dict(own)
            if self._optimizer is not None:
                restore(self._optimizer, tensors, json.loads(metadata["optimizer"]))
            return bytes(tensors["caller"].numpy())
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataLoss(f"the checkpoint is of other experts, or damaged: {error}") from None


class ClusterMixture:
    """The candidates of a session; `moe` is the layer without a gate."""

    def __init__(self, moe: RemoteMoE, session: TrainingSession) -> None:
        self.names = tuple(id.rpartition("/")[2] for id in moe.experts)
        self._moe = moe
        self._session = session

    def __call__(self, x: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers."""
        y: Tensor = self._moe(x, indices=indices_TK, weights=weights_TK)
        return y

    def step(self, lr: float) -> None:
        """Update the candidates."""
        self._session.step(lr=lr)

    def forget(self) -> None:
        """Drop the gradients."""
        self._session.zero_grad()

    def train(self, training: bool) -> None:
        """Whether dropout and the like are on."""
        self._moe.train(training)

    def save(self, caller: bytes) -> None:
        """Make the last step durable."""
        self._session.save(caller)
