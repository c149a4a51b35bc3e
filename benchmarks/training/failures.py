"""One call of an expert in ten fails: a classifier is trained all the same, beside one without failures."""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from benchmarks.chaos.figures import say
from torch import Tensor
from torch.nn import functional as F

from expertmesh import Client, RemoteMoE
from expertmesh.experts.modules import FeedForward

from .cluster import LAYER, WIDTH, gate, training_cluster

CLASSES = 8
POINT = 0.01


class Failing(FeedForward):
    """A feed-forward expert that fails one call in ten while it is trained, by a generator of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._draw: random.Random | None = None

    def forward(self, x_RD: Tensor) -> Tensor:
        if self._draw is None:  # each expert its own, from its weights
            self._draw = random.Random(float(self.up_proj.weight.detach().sum()))
        if self.training and self._draw.random() < SHARE:
            raise RuntimeError("it was told to fail")
        return super().forward(x_RD)


SHARE = 0.1


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the experiment."""
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)


def classes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows [count, WIDTH] around a centre for each class, and their classes [count]; some overlap."""
    centres_CD = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.9
    generator = torch.Generator().manual_seed(seed)
    y_T = torch.randint(CLASSES, (count,), generator=generator)
    return centres_CD[y_T] + torch.randn(count, WIDTH, generator=generator), y_T


def accuracy_of(client: Client, steps: int, seed: int) -> tuple[float, int]:
    """Train gate and experts; the accuracy on rows that were not seen, and how many calls failed."""
    session = client.train(
        LAYER, optimizer="torch.optim:AdamW", lr=3e-3, on_missing="leave_out", patience=0.0, seed=seed
    )
    with session:
        own = gate(4)
        moe = RemoteMoE(client, LAYER, gate=own, session=session)
        optimizer = torch.optim.AdamW(own.parameters(), lr=3e-3)
        x, y = classes(seed, 64 * steps)
        for at in range(steps):
            batch = slice(64 * at, 64 * at + 64)
            optimizer.zero_grad()
            loss = F.cross_entropy(moe(x[batch])[:, :CLASSES], y[batch]) + 0.01 * moe.aux_loss
            torch.autograd.backward(loss)
            optimizer.step()
            session.step()
        session.publish(gate=own)
        held_x, held_y = classes(1000 + seed, 4000)
        answers = torch.as_tensor(client.forward(LAYER, held_x))[:, :CLASSES]
        return float((answers.argmax(dim=1) == held_y).float().mean()), session.left_out


def run(options: argparse.Namespace) -> list[str]:
    """Run the experiment; returns what was not as it must be."""
    found: dict[str, list[float]] = {}
    for name, factory in (("without failures", ""), ("one call in ten fails", f"{__name__}:Failing")):
        for seed in range(options.seeds):
            with training_cluster("bench-training-failures", factory=factory, transport="local") as (_, client):
                accuracy, failed = accuracy_of(client, options.steps, seed)
            say(f"{name}, seed {seed}: held-out accuracy", f"{accuracy:.4f} ({failed} calls failed)")
            found.setdefault(name, []).append(accuracy)
            if factory and not failed:
                return ["no call failed, so nothing was shown"]
    whole, failing = (sum(values) / len(values) for values in found.values())
    say("mean without, with failures", f"{whole:.4f}, {failing:.4f}")
    return [] if failing >= whole - POINT else [f"accuracy fell by {100 * (whole - failing):.2f} points"]
