"""A candidate of one expert: a copy that learns beside the versions that serve, with its optimizer and its ledger."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataLoss, FailedPrecondition, SpecMismatch
from ..weights.files import check_fit, load_into, tensors_from_bytes, tensors_of, tensors_to_bytes
from .ledger import Ledger
from .optimizer import build_optimizer
from .optimizer_state import restore, state_of
from .passes import Gradients, Graph, forward, gradients_of, graph_of
from .slices import Packed, unpack

WEIGHTS, LEDGER = "weights.", "ledger"


@dataclass(frozen=True)
class TrainedBy:
    """The optimizer of a session, by name and arguments; None where its gradients go to the caller."""

    optimizer: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Candidate:
    """A copy of a serving module that is trained. One thread at a time uses it.

    `square` is the sum of the squared gradients of the next step: NaN or infinity if one is not finite.
    """

    def __init__(
        self,
        module: nn.Module,
        by: TrainedBy,
        dtype: torch.dtype | None,
        *,
        frozen: Collection[str] = (),
        name: str = "",
    ) -> None:
        """Copy `module`, which serves on; floating-point rows are cast to `dtype`, and parameters `frozen` stay so.

        Experts of another `name` draw other random numbers. Raises ConfigError for an expert without parameters to
        train, or an optimizer that cannot be had.
        """
        self.module = copy.deepcopy(module).train()
        self.ledger = Ledger()
        self.square = 0.0
        self._dtype = dtype
        self._name = name
        self._parameters = [
            parameter
            for key, parameter in self.module.named_parameters()
            if parameter.is_floating_point() and key not in frozen
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        if not self._parameters:
            raise ConfigError("it has no parameters to train: none of floating point whose requires_grad is True")
        self._kept: dict[int, Graph] = {}
        self._buffers = _buffers_of(self.module)
        self._optimizer: torch.optim.Optimizer | None = None
        if by.optimizer is not None:
            self._optimizer = build_optimizer(by.optimizer, self._parameters, by.arguments)

    def forward(
        self, rows_n: Tensor, step: int, seed: int, *, training: bool = True, keep: int = 0, of_rows: bool = True
    ) -> Tensor:
        """The answers [n, ...] of the state before `step`, in training mode or not.

        What their backward pass, with the same seed, needs is kept for that if `keep`: of so many passes at most.
        Otherwise, or where it comes too late, it computes the forward pass again. Raises OutOfStep.
        """
        self.ledger.check_step(step)
        self.module.train(training)
        drawn = seed_of(seed, self._name)
        if keep and not self._buffers:  # or the first backward pass would not count in them
            while len(self._kept) >= keep and seed not in self._kept:
                self._kept.pop(next(iter(self._kept)))
            self._kept[seed] = graph = graph_of(self.module, self._cast(rows_n), drawn, of_rows=of_rows)
            return graph.answers_n.detach()
        with self._same_buffers():
            return forward(self.module, self._cast(rows_n), drawn)

    def backward(
        self,
        rows_n: Tensor,
        gradients_n: Tensor,
        weights_n: Tensor | None,
        step: int,
        number: int,
        seed: int,
        *,
        training: bool = True,
        of_rows: bool = True,
    ) -> Gradients:
        """The backward pass `number` of a step, as `passes.backward`; a repeated one adds no gradients.

        Raises OutOfStep for a pass that does not follow. One that fails changes nothing.
        """
        is_new = self.ledger.is_new_pass(step, number, seed)
        with self._same_buffers() as counts:
            found = self._gradients(rows_n, gradients_n, weights_n, seed, training=training, of_rows=of_rows)
            if not is_new:
                return found
            counts()
        self._add(found.parameters, seed)
        return found

    def slice(
        self,
        rows_n: Tensor,
        gradients_n: Tensor,
        weights_n: Tensor | None,
        step: int,
        seed: int,
        *,
        training: bool = True,
        of_rows: bool = True,
    ) -> Gradients:
        """The gradients of a slice of a pass, which are kept nowhere: `add` takes their sum. Changes nothing.

        Raises OutOfStep, and FailedPrecondition for a module that changes its buffers: those have no sum.
        """
        self.ledger.check_step(step)
        with self._same_buffers():
            found = self._gradients(rows_n, gradients_n, weights_n, seed, training=training, of_rows=of_rows)
            now = _buffers_of(self.module)
            if any(not torch.equal(now[key], buffer) for key, buffer in self._buffers.items()):
                raise FailedPrecondition(
                    "it keeps averages of its rows in buffers, which several replicas cannot add up: train it on its "
                    'first replica alone, with replicas="first"'
                )
        return found

    def add(self, packed: Packed, step: int, number: int, seed: int) -> None:
        """Count a backward pass whose gradients were computed in slices: their sum; a repeated one adds nothing.

        Raises OutOfStep, and InvalidRequest for gradients of another expert.
        """
        if self.ledger.is_new_pass(step, number, seed):
            self._add(unpack(packed, self._parameters), seed)

    def _gradients(
        self,
        rows_n: Tensor,
        gradients_n: Tensor,
        weights_n: Tensor | None,
        seed: int,
        *,
        training: bool,
        of_rows: bool,
    ) -> Gradients:
        self.module.train(training)
        graph = self._kept.pop(seed, None)
        if graph is None:
            graph = graph_of(self.module, self._cast(rows_n), seed_of(seed, self._name), of_rows=of_rows)
        return gradients_of(graph, gradients_n, weights_n, self._parameters)

    def _add(self, gradients: Sequence[Tensor | None], seed: int) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self.ledger.seeds.append(seed)
        self.square = self._measure()

    def _measure(self) -> float:
        found = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not found:
            return 0.0
        norm = float(torch.nn.utils.get_total_norm(found))
        return norm * norm

    def forget_gradients(self, step: int) -> None:
        """Drop the backward passes of the next step, and what they changed. Raises OutOfStep."""
        self.ledger.check_step(step)
        _put_back(self.module, self._buffers)
        self._begin_step()

    def _begin_step(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self.ledger.seeds, self.square = [], 0.0
        self._kept.clear()
        self._buffers = _buffers_of(self.module)

    def update(self, step: int, passes: int, seeds: int, lr: float | None, scale: float) -> dict[str, Any]:
        """Apply the next step once, its gradients times `scale`, at the learning rate `lr`; returns its result.

        It is made of so many `passes`, with this chain of `seeds`. Whoever is told another error than those below must
        drop the candidate: it may be half updated. Raises OutOfStep, and what `Ledger.recorded` raises.
        """
        request = {"passes": passes, "seeds": seeds, "lr": lr, "scale": scale}
        if (known := self.ledger.recorded(step, request)) is not None:
            return known
        self.ledger.check_passes(step, passes, seeds)
        if self._optimizer is None:
            raise FailedPrecondition("the session has no optimizer: load the weights that yours has computed")
        if not math.isfinite(self.square):
            raise FailedPrecondition("its gradients are not finite (NaN or infinity): nothing was changed")
        if passes:
            for group in self._optimizer.param_groups:
                if lr is not None:
                    group["lr"] = lr
            if scale != 1.0:
                for parameter in self._parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
            self._optimizer.step()
        return self._recorded(step, request, {"square": self.square})

    def follow(self, step: int, weights: bytes) -> None:
        """Become a copy, before `step`, of a candidate elsewhere that has these weights: it computes slices alone.

        Raises SpecMismatch or DataLoss.
        """
        with torch.no_grad():
            load_into(self.module, tensors_from_bytes(weights)[0], "the weights of the candidate")
        self.ledger = Ledger(applied=step - 1)
        self._begin_step()

    def check_weights(self, weights: bytes) -> None:
        """Check that weights fit, and are finite. Raises SpecMismatch or DataLoss."""
        tensors, _ = tensors_from_bytes(weights)
        own = self.module.state_dict()
        check_fit(
            {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
            {name: (tuple(value.shape), value.dtype) for name, value in own.items()},
            "the weights",
        )
        if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
            raise SpecMismatch("the weights are not finite (NaN or infinity): nothing was changed")

    def load(self, step: int, weights: bytes | None) -> dict[str, Any]:
        """Take weights that the caller has computed as the next step, once; None to keep them.

        Raises OutOfStep, SpecMismatch or DataLoss.
        """
        request = {"weights": hashlib.sha256(weights or b"").hexdigest()}
        if (known := self.ledger.recorded(step, request)) is not None:
            return known
        if weights is not None:
            self.check_weights(weights)
            with torch.no_grad():
                load_into(self.module, tensors_from_bytes(weights)[0], "the weights")
        return self._recorded(step, request, {"square": 0.0})

    def _recorded(self, step: int, request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        self.ledger.record(step, request, result)
        self._begin_step()
        return result

    def gradients(self, step: int, passes: int, seeds: int) -> bytes:
        """The gradients of the next step by parameter, as safetensors; those that it has. Raises OutOfStep."""
        self.ledger.check_passes(step, passes, seeds)
        named = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        return tensors_to_bytes(named)

    def weights(self) -> bytes:
        """The weights as safetensors, as a swap takes them."""
        return tensors_to_bytes(tensors_of(self.module))

    def state(self) -> bytes:
        """Weights, optimizer and ledger at the end of the last step, as safetensors."""
        tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in tensors_of(self.module).items()}
        document: dict[str, Any] = {"ledger": self.ledger.document()}
        if self._optimizer is not None:
            moments, document["optimizer"] = state_of(self._optimizer)
            tensors |= moments
        return tensors_to_bytes(tensors, {LEDGER: json.dumps(document)})

    def restore(self, state: bytes) -> None:
        """Go back to a state that `state` returned. Raises DataLoss or SpecMismatch."""
        tensors, metadata = tensors_from_bytes(state)
        try:
            document = json.loads(metadata[LEDGER])
            ledger = Ledger.of(document["ledger"])
            saved = document.get("optimizer")
            if self._optimizer is not None and saved is not None:
                restore(self._optimizer, tensors, saved)
        except (KeyError, ValueError, TypeError) as error:
            raise DataLoss(f"the saved state of a candidate cannot be read: {error}") from None
        weights = {n.removeprefix(WEIGHTS): t for n, t in tensors.items() if n.startswith(WEIGHTS)}
        with torch.no_grad():
            load_into(self.module, weights, "the saved state")
        self._begin_step()
        self.ledger = ledger

    def _cast(self, rows_n: Tensor) -> Tensor:
        return rows_n.to(self._dtype) if self._dtype is not None and rows_n.is_floating_point() else rows_n

    @contextmanager
    def _same_buffers(self) -> Iterator[Callable[[], None]]:
        """Restore the buffers after a block, such as running averages of rows, unless it says that it counts."""
        before = _buffers_of(self.module) if self._buffers else {}
        counted: list[bool] = []
        try:
            yield lambda: counted.append(True)
        finally:
            if not counted:
                _put_back(self.module, before)


def seed_of(seed: int, name: str) -> int:
    """The seed of an expert for the seed of a pass: experts draw different numbers."""
    mixed = seed
    for byte in name.encode():
        mixed = (mixed * 1_000_003 ^ byte) % 2**63
    return mixed


Buffers = dict[tuple[str, str], Tensor]
"""Copies of buffers, by the name of their module and their own."""


def _buffers_of(module: nn.Module) -> Buffers:
    return {
        (path, name): buffer.clone()
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    }


def _put_back(module: nn.Module, buffers: Buffers) -> None:
    for (path, name), buffer in buffers.items():  # by name: a module may have put another tensor in the place of one
        module.get_submodule(path)._buffers[name] = buffer.clone()
