"""One small gate of every kind, random rows, and a routing as plain dictionaries: what the tests of gates share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.router import gates
from expertmesh.router.gates import Gate, Routing

WIDTH, EXPERTS = 6, 8

SAMPLES: dict[str, dict[str, Any]] = {
    "top_k": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3},
    "top_k before": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "softmax": "before", "renormalize": False},
    "top_k grouped": {
        "in_features": WIDTH, "num_experts": EXPERTS, "k": 2, "softmax": "before", "renormalize": False, "groups": 4,
        "top_groups": 2, "scale": 16.0, "bias": True,
    },
    "switch": {"in_features": WIDTH, "num_experts": EXPERTS},
    "noisy_top_k": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3},
    "sigmoid": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "scale": 2.5},
    "sigmoid grouped": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "groups": 4, "top_groups": 2},
    "threshold": {"in_features": WIDTH, "num_experts": EXPERTS, "threshold": 0.6},
    "threshold softmax": {
        "in_features": WIDTH, "num_experts": EXPERTS, "threshold": 0.2, "score": "softmax", "renormalize": False,
    },
    "top_p": {"in_features": WIDTH, "num_experts": EXPERTS, "p": 0.6},
    "cosine": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 2, "projection": 4},
    "expert_choice": {"in_features": WIDTH, "num_experts": EXPERTS, "capacity_factor": 2.0},
    "hash": {"num_experts": EXPERTS, "k": 3, "seed": 5},
    "fixed": {"weights": [0.5, 0.1, 0.0, 2.0, 0.3, 0.3, 0.7, 1.0], "k": 4},
    "custom": {"scorer": "torch.nn:Linear", "args": [WIDTH, EXPERTS], "num_experts": EXPERTS, "k": 2},
}  # fmt: skip


def make(sample: str, seed: int = 0) -> Gate:
    torch.manual_seed(seed)
    gate = gates.build(sample.partition(" ")[0], **SAMPLES[sample])
    for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]:
        if name != "weights_E":
            torch.nn.init.normal_(tensor, std=0.5 if name == "expert_bias" else 1.0)
    return gate.eval()


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def chosen(routing: Routing) -> list[dict[int, float]]:
    """Per row {expert: weight}."""
    pairs = zip(routing.indices_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    return [{e: w for e, w in zip(es, ws, strict=True) if e >= 0} for es, ws in pairs]


def close(found: list[dict[int, float]], wanted: list[dict[int, float]]) -> None:
    assert [set(row) for row in found] == [set(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
