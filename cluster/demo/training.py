"""The demo's training: each expert on its own rows, then their gate, and a dense model for comparison.

Shapes: T rows, D features, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...experts.spec import Expert
from ...router import gates
from ...router.mixture.layer import Layer
from ..training.data import TrainingData
from ..training.mixture import LocalMixture
from ..training.phases import Phase
from ..training.record import Progress
from ..training.trainer import Trainer
from .features import Dataset

NUM_EXPERTS = 8
TOP_K = 2
HIDDEN = 32
NEAREST = 2
"""The number of experts in whose region a row is."""

SHARE = 0.4
"""The share of all other rows that an expert also trains on, so that it has seen every label."""

FEED_FORWARD = "expertmesh.experts.modules:FeedForward"
OPTIONS: dict[str, Any] = {"batch": 128, "dropout": 0.5, "arguments": {"weight_decay": 0.01}}
EXPERTS = Phase(kind="experts", epochs=30, lr=1e-3, schedule="one_cycle")
GATE = Phase(kind="gate", epochs=10, lr=1e-3, schedule="one_cycle")
JOINT = Phase(kind="joint", epochs=10, lr=1e-3, schedule="one_cycle")
DENSE = Phase(kind="experts", epochs=20, lr=1e-3, schedule="one_cycle")


@dataclass(frozen=True)
class Trained:
    """The experts, the rows each was trained on (bool [T, E]), their gate, and the dense model."""

    experts: tuple[nn.Module, ...]
    seen_TE: Tensor
    gate: gates.Gate
    dense: nn.Module

    @property
    def sparse_parameters(self) -> int:
        """The number of parameters of all experts and the gate."""
        return sum(parameters(model) for model in (*self.experts, self.gate))


def train(data: Dataset, *, seed: int = 0, progress: Callable[[str], None] = lambda message: None) -> Trained:
    """Train experts, gate and dense model on the training rows; `progress` is called with a message now and then."""
    experts = {f"e{number}": _declared(data, HIDDEN) for number in range(NUM_EXPERTS)}
    layer = Layer("text", gates.TopK(data.width, NUM_EXPERTS, k=TOP_K, bias=True), experts)
    progress("clustering the training rows into one region per expert")
    trainer = Trainer(
        layer,
        _rows(data),
        phases=(EXPERTS, GATE, JOINT),
        subsets="cluster",
        nearest=NEAREST,
        share=SHARE,
        explore=1.0,
        balance=0.0,
        seed=seed,
        **OPTIONS,
    )
    rows = trainer.seen_TE.sum(dim=0).tolist()
    progress(
        f"training {NUM_EXPERTS} experts, each on its own {min(rows)} to {max(rows)} rows, their gate, and all jointly"
    )
    trainer.fit(_told(progress))
    trained, gate = _modules(trainer), layer.gate
    total = sum(parameters(model) for model in (*trained, gate))
    progress(f"training a dense model with as many parameters ({total:,}) on all rows")
    dense = train_dense(data, equal_width(total, data), DENSE, seed=seed)
    return Trained(trained, trainer.seen_TE, gate.eval(), dense)


def train_gate(data: Dataset, experts: Sequence[nn.Module], *, seed: int = 0) -> gates.TopK:
    """Train a top-k gate for experts as they are, starting from their regions.

    The loss is that of the mixture of the chosen experts plus that of the mixture of all experts.
    """
    live = {f"e{number}": Expert.from_module(expert) for number, expert in enumerate(experts)}
    gate = gates.TopK(data.width, len(live), k=TOP_K, bias=True)
    trainer = Trainer(
        Layer("text", gate, live), _rows(data), phases=(GATE,), explore=1.0, balance=0.0, seed=seed, **OPTIONS
    )
    trainer.fit()
    return gate.eval()


def train_dense(data: Dataset, hidden: int, phase: Phase = EXPERTS, *, seed: int = 0) -> nn.Module:
    """Train one model on all rows: a layer of a single expert."""
    layer = Layer("dense", gates.Fixed([1.0]), {"e0": _declared(data, hidden)})
    trainer = Trainer(layer, _rows(data), phases=(phase,), subsets="all", seed=seed, **OPTIONS)
    trainer.fit()
    return _modules(trainer)[0]


def _declared(data: Dataset, hidden: int) -> Expert:
    return Expert(FEED_FORWARD, args=(data.width, hidden), kwargs={"out_features": len(data.names)})


def _rows(data: Dataset) -> TrainingData:
    return TrainingData(data.train_x_TD, data.train_y_T, data.held_x_TD, data.held_y_T, data.names)


def _modules(trainer: Trainer) -> tuple[nn.Module, ...]:
    mixture = trainer.mixture
    if not isinstance(mixture, LocalMixture):
        raise TypeError("the demo trains in its own process")
    return tuple(module.eval().requires_grad_(False) for module in mixture.modules)


def _told(progress: Callable[[str], None]) -> Callable[[Progress], None]:
    """A line at the end of every tenth epoch."""

    def tell(told: Progress) -> None:
        if told.epoch % 10 == 0 and told.step * told.epochs == told.epoch * told.steps:
            progress(str(told))

    return tell


def accuracy(scores_TC: Tensor, y_T: Tensor) -> float:
    """The share of rows whose label has the highest score."""
    return float((scores_TC.argmax(dim=1) == y_T).float().mean())


def parameters(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def equal_width(total: int, data: Dataset) -> int:
    """The hidden width at which a dense model has closest to `total` parameters."""
    classes = len(data.names)
    return max(1, round((total - classes) / (data.width + 1 + classes)))
