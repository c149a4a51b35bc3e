"""What a training starts from: its loss, the rows of each expert, and a gate that knows their regions.

Shapes: T rows, D features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experts.errors import ConfigError
from ...experts.training.k_means import k_means
from ...experts.training.subsets import by_cluster, by_label, by_random
from ...router.gates.linear import LinearGate
from ...router.mixture.layer import Layer
from .data import TrainingData

SHARPNESS = 2.0
Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(loss: str | Loss | None, data: TrainingData) -> tuple[Loss, str]:
    """The loss of a name, or the function that is given, and the held-out figure: "accuracy" or "loss".

    Raises ConfigError.
    """
    known: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
    if callable(loss):
        return loss, "loss"
    name = loss or ("cross_entropy" if data.is_classified else "mse")
    if name not in known:
        raise ConfigError(f"loss must be one of {', '.join(known)}, or a function, not {name!r}")
    return known[name], "accuracy" if name == "cross_entropy" and data.is_classified else "loss"


def fitting(loss: Loss) -> Loss:
    """A loss that says so where answers and targets do not fit together, by ConfigError."""

    def checked(answers: Tensor, targets: Tensor) -> Tensor:
        try:
            return loss(answers, targets)
        except (IndexError, RuntimeError) as error:
            raise ConfigError(
                f"answers of {list(answers.shape[1:])} and targets of {list(targets.shape[1:])} do not fit this loss: "
                f"{error}. Experts need an output for each class"
            ) from None

    return checked


def check_local(layer: Layer) -> None:
    """Check that a layer can be trained in one process: its plain weighted sum alone. Raises ConfigError."""
    usual: dict[str, object] = {"combine": "weighted_sum", "shared": {}, "capacity": None}
    for name, value in usual.items():
        if getattr(layer, name) != value:
            raise ConfigError(
                f"layer {layer.name} has its own {name}, which training in this process does not know: train it in a "
                "running cluster"
            )


def subsets_of(subsets: str, data: TrainingData, count: int, nearest: int, share: float, seed: int) -> Tensor:
    """Which experts are trained on which rows: bool [T, E]. Raises ConfigError."""
    if subsets == "all":
        return torch.ones(len(data.x), count, dtype=torch.bool)
    if subsets == "random":
        return by_random(len(data.x), count, nearest=nearest, share=share, seed=seed)
    if subsets == "label":
        if not data.is_classified:
            raise ConfigError("subsets by label need targets that are classes: choose cluster or random")
        return by_label(data.y, count, nearest=nearest, share=share, seed=seed)
    return by_cluster(data.x.flatten(1).float(), count, nearest=nearest, share=share, seed=seed)


def aim_gate(gate: LinearGate, x: Tensor, seed: int) -> None:
    """Let a gate prefer the expert of the nearest region c: scores 2/√D · (x·c - |c|²/2)."""
    rows_TD = x.flatten(1).float()
    centres_ED = k_means(rows_TD, gate.num_experts, seed=seed).centres_KD
    scale = SHARPNESS / rows_TD.shape[1] ** 0.5
    with torch.no_grad():
        gate.weight.copy_(centres_ED * scale)
        bias = dict(gate.named_parameters()).get("bias")
        if bias is not None:
            bias.copy_(-(centres_ED**2).sum(dim=1) / 2 * scale)
