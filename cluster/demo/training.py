"""The demo's training: each expert on its own subset of the rows, then their gate, and a dense model for comparison.

Shapes: T rows, D features, E experts, C classes, K experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from ...experts.modules import FeedForward
from ...router import gates
from .features import Dataset

NUM_EXPERTS = 8
TOP_K = 2
HIDDEN = 32
NEAREST = 2
"""The number of expert regions that a row belongs to."""

SHARE = 0.4
"""The share of all other rows that an expert also trains on, so that it has seen every label."""

BATCH = 128
DROPOUT = 0.5
EXPERT_EPOCHS = 30
DENSE_EPOCHS = 20
GATE_EPOCHS = 10
EXPERT_RATE = 1e-3
DENSE_RATE = 1e-3
GATE_RATE = 1e-3
WEIGHT_DECAY = 0.01
GATE_SHARPNESS = 2.0


@dataclass(frozen=True)
class Trained:
    """The experts, the rows each was trained on (bool [T, E]), their gate, the dense model, and the region centres."""

    experts: tuple[FeedForward, ...]
    seen_TE: Tensor
    gate: gates.TopK
    dense: FeedForward
    centres_ED: Tensor

    @property
    def sparse_parameters(self) -> int:
        """The number of parameters of all experts and the gate."""
        return sum(parameters(model) for model in (*self.experts, self.gate))


def train(data: Dataset, *, seed: int = 0, progress: Callable[[str], None] = lambda message: None) -> Trained:
    """Train experts, gate and dense model on the training rows; calls `progress` with a message before each step."""
    torch.manual_seed(seed)
    progress("clustering the training rows into one region per expert")
    centres_ED = regions(data.train_x_TD, seed)
    near_TE = torch.cdist(data.train_x_TD, centres_ED).topk(NEAREST, largest=False).indices
    seen_TE = F.one_hot(near_TE, NUM_EXPERTS).any(dim=1) | (torch.rand(len(near_TE), NUM_EXPERTS) < SHARE)
    experts = []
    for expert in range(NUM_EXPERTS):
        rows = int(seen_TE[:, expert].sum())
        progress(f"training expert {expert + 1} of {NUM_EXPERTS} on its {rows} rows")
        experts.append(train_expert(data, seen_TE[:, expert]))
    progress("training the gate")
    gate = train_gate(data, experts, centres_ED)
    total = sum(parameters(model) for model in (*experts, gate))
    progress(f"training a dense model with as many parameters ({total:,}) on all rows")
    dense = FeedForward(data.width, equal_width(total, data), out_features=len(data.names))
    fit(dense, data.train_x_TD, data.train_y_T, DENSE_EPOCHS, DENSE_RATE)
    return Trained(tuple(experts), seen_TE, gate, dense, centres_ED)


def train_expert(data: Dataset, seen_T: Tensor) -> FeedForward:
    """Train an expert on its own subset of the rows, with AdamW and cross-entropy."""
    expert = FeedForward(data.width, HIDDEN, out_features=len(data.names))
    fit(expert, data.train_x_TD[seen_T], data.train_y_T[seen_T], EXPERT_EPOCHS, EXPERT_RATE)
    return expert


def regions(x_TD: Tensor, seed: int) -> Tensor:
    """The region centres [E, D], by k-means."""
    clusters = KMeans(NUM_EXPERTS, n_init=3, random_state=seed).fit(x_TD.numpy())
    return torch.from_numpy(clusters.cluster_centers_).float()


def train_gate(data: Dataset, experts: Iterable[nn.Module], centres_ED: Tensor) -> gates.TopK:
    """Train a top-k gate for frozen experts, starting from the region centres.

    The loss is the cross-entropy of the mixture of the chosen experts plus that of the mixture of all experts.
    """
    x_TD, y_T = data.train_x_TD, data.train_y_T
    gate = gates.TopK(data.width, NUM_EXPERTS, k=TOP_K, bias=True)
    scale = GATE_SHARPNESS / data.width**0.5
    with torch.no_grad():
        gate.weight.copy_(centres_ED * scale)
        gate.get_parameter("bias").copy_(-(centres_ED**2).sum(dim=1) / 2 * scale)
        answers_TEC = torch.stack([expert(x_TD) for expert in experts], dim=1)

    def loss(rows: Tensor) -> Tensor:
        scores_TE = gate.scores(F.dropout(x_TD[rows], DROPOUT))
        routing = gate.select(scores_TE)
        sparse_TE = torch.zeros_like(scores_TE).scatter(1, routing.indices_TK, routing.weights_TK)
        chosen_TC, all_TC = (mixture(answers_TEC[rows], w_TE) for w_TE in (sparse_TE, scores_TE.softmax(dim=1)))
        return F.cross_entropy(chosen_TC, y_T[rows]) + F.cross_entropy(all_TC, y_T[rows])

    descend(gate.parameters(), loss, len(x_TD), GATE_EPOCHS, GATE_RATE)
    return gate.eval()


def mixture(answers_TEC: Tensor, weights_TE: Tensor) -> Tensor:
    """The weighted sum of the experts' answers [T, C]."""
    return (answers_TEC * weights_TE[:, :, None]).sum(dim=1)


def fit(model: nn.Module, x_TD: Tensor, y_T: Tensor, epochs: int, rate: float) -> None:
    """Train a classifier with input dropout, and leave it in evaluation mode."""

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(F.dropout(x_TD[rows], DROPOUT)), y_T[rows])

    descend(model.parameters(), loss, len(x_TD), epochs, rate)
    model.eval()


def descend(
    weights: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], rows: int, epochs: int, rate: float
) -> None:
    """AdamW over shuffled batches of row indices, with a one-cycle learning rate (Smith 2018)."""
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-rows // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(rows), BATCH):
            optimiser.zero_grad()
            torch.autograd.backward(loss(batch))
            optimiser.step()
            schedule.step()


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
