"""Image classification: each expert is a small convolutional network, and the gate sends it the shapes that it knows.

The data are the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships. With --data it is a folder with a
subfolder of images for each class, which are all scaled to cover a square of `--set side=32` pixels and cut to it
around their centre; a file that is no image is refused by its name. 40 % of the images are held out, since a fifth of
the digits would be too few to tell models apart; 20 % arrive only when the layer is serving.

Each expert is a whole network, from pixels to scores, and not a head on a stem that all share: so whoever replaces one
expert changes that expert alone, and a request is an image, as it is. What all experts need is first learned by one
network, of which every expert begins as a copy (sparse upcycling, Komatsuzaki et al. 2022): experts that begin apart
see a part of the images each, and with few images that is too little to learn from. All models are trained on images
that are turned, scaled and moved a little. The networks are as small as the digits allow; larger pictures want
`--set width=16` or more.

Shapes: T images, C channels, S pixels a side, E experts, K choices, N classes.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import Client, Cluster, ConfigError, Expert, Layer, RemoteMoE, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.plots import plot_confusion
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.rpc.swaps import SwapOutcome
from expertmesh.examples.data.image_files import read_folder
from expertmesh.experts.training.k_means import k_means
from expertmesh.experts.weights.files import save_module
from expertmesh.router.mixture.balance import load_balance_loss
from expertmesh.router.mixture.local import LocalLayer

LAYER = "images"
OPTIONS = {"side": "32", "width": "8"}
HELD_OUT, LATER = 0.4, 0.2
EXPERTS, TOP_K = 8, 1
STEPS, BATCH, LR, LR_OF_EXPERTS = 1200, 64, 1e-2, 3e-3
UPDATE_STEPS, UPDATE_LR = 100, 1e-3
BALANCE = 0.01
VARIED = torch.tensor([0.15, 0.1, 0.1, 0.12, 0.12])
"""How much an image is varied in training: turned (radians), scaled across and along, moved (shares of half a side)."""
GLANCE = 4
"""Pixels a side of what the gate sees of an image."""
MOST_NAMES = 40
"""Classes of which a confusion matrix can still be read."""


class Network(nn.Module):
    """Two convolutions with pooling, and a linear layer: images [T, C, S, S] to scores [T, N]."""

    def __init__(self, channels: int, side: int, classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.scores = nn.Linear(2 * width * (side // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        scores_TN: Tensor = self.scores(x.flatten(1))
        return scores_TN


class Glance(nn.Module):
    """Scores of the experts [T, E] from an image [T, C, S, S] that is averaged to 4x4 pixels."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * GLANCE**2, experts)

    def seen(self, x: Tensor) -> Tensor:
        """What the scores are computed from."""
        return F.adaptive_avg_pool2d(x, GLANCE).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        scores_TE: Tensor = self.linear(self.seen(x))
        return scores_TE

    @torch.no_grad()
    def aim(self, x: Tensor, seed: int) -> None:
        """Prefer for each image the expert of the nearest region c: scores x·c - |c|²/2."""
        centres_ED = k_means(self.seen(x), self.linear.out_features, seed=seed).centres_KD
        self.linear.weight.copy_(centres_ED)
        self.linear.bias.copy_(-(centres_ED**2).sum(dim=1) / 2)


@dataclass(frozen=True)
class Data:
    """Images for training, those that arrive later, and those held out, with their classes."""

    x: Tensor
    y: Tensor
    later_x: Tensor
    later_y: Tensor
    held_x: Tensor
    held_y: Tensor
    names: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels, pixels a side and classes."""
        return self.x.shape[1], self.x.shape[2], len(self.names)


def read(job: Job) -> Data:
    """Read the images, and divide those of each class with the seed. Raises ConfigError."""
    if job.data is None:
        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target).long()
        names = tuple(str(name) for name in digits.target_names)
    else:
        x, y, names = read_folder(job.data, whole(job, "side", 8, 256))
    known, held = train_test_split(torch.arange(len(y)), test_size=HELD_OUT, stratify=y, random_state=job.seed)
    if job.small:
        known, held = known[:400], held[:200]
    first = round(len(known) * (1 - LATER / (1 - HELD_OUT)))
    return Data(x[known[:first]], y[known[:first]], x[known[first:]], y[known[first:]], x[held], y[held], names)


def whole(job: Job, option: str, least: int, most: int) -> int:
    """An option that is a whole number. Raises ConfigError."""
    text = job.options.get(option, OPTIONS[option])
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"--set {option}={text}: it must be a whole number from {least} to {most}")
    return int(text)


def train(job: Job, data: Data) -> tuple[LocalLayer, dict[str, Network], float]:
    """The sparse layer, its experts, and the seconds of training: one network first, then its copies and the gate."""
    steps, experts = (STEPS // 20, 4) if job.small else (STEPS, EXPERTS)
    torch.manual_seed(job.seed)
    one = Network(*data.sizes, whole(job, "width", 1, 256))
    seconds = fit_network(job, data, one, "seed expert", steps // 2)
    channels = data.x.shape[1]
    gate = gates.Custom("expertmesh.examples.images:Glance", experts, TOP_K, args=[channels, experts])
    gate.scorer.aim(data.x, job.seed)
    networks = {f"e{number}": copy.deepcopy(one) for number in range(experts)}
    layer = LocalLayer(gate, networks)

    def loss_of(step: int) -> Tensor:
        rows = batch_of(job.seed, steps // 2 + step, len(data.x))
        x = varied(data.x[rows], job.seed, steps // 2 + step)
        scores_TE = gate.scores(x)
        routing = gate.select(scores_TE)
        balance = load_balance_loss(scores_TE.softmax(dim=1), routing)
        return F.cross_entropy(layer.with_routing(x, routing).output, data.y[rows]) + BALANCE * balance

    path = job.folder / "sparse.safetensors"
    seconds += fit(layer, loss_of, steps=steps - steps // 2, lr=LR_OF_EXPERTS, checkpoint=path, tell=job.tell)
    return layer, networks, seconds


def train_dense(job: Job, data: Data, size: int, name: str) -> tuple[Network, str, float]:
    """The smallest network of at least so many parameters, trained for as many steps as the sparse layer."""
    torch.manual_seed(job.seed)
    model = next(model for width in count(1) if parameters(model := Network(*data.sizes, width)) >= size)
    return model, name, fit_network(job, data, model, f"dense-{name}", STEPS // 20 if job.small else STEPS)


def fit_network(job: Job, data: Data, model: Network, name: str, steps: int) -> float:
    """Train a network on its own."""

    def loss_of(step: int) -> Tensor:
        rows = batch_of(job.seed, step, len(data.x))
        return F.cross_entropy(model(varied(data.x[rows], job.seed, step)), data.y[rows])

    return fit(model, loss_of, steps=steps, lr=LR, checkpoint=job.folder / f"{name}.safetensors", tell=job.tell)


def batch_of(seed: int, step: int, rows: int) -> Tensor:
    """The positions of a step's images."""
    return torch.randint(0, rows, (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


def varied(x: Tensor, seed: int, step: int) -> Tensor:
    """Images that are turned, scaled and moved a little, as it happens to pictures of the same thing."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    turn, wide, high, right, down = (torch.rand(5, len(x), generator=draw) * 2 - 1) * VARIED[:, None]
    rows = [
        (1 + wide) * turn.cos(),
        -(1 + wide) * turn.sin(),
        right,
        (1 + high) * turn.sin(),
        (1 + high) * turn.cos(),
        down,
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def run(job: Job) -> Result:
    """Train, serve, measure and update for one seed."""
    torch.set_num_threads(1)  # for networks as small as these, more only wait for each other
    data = read(job)
    sparse, experts, seconds = train(job, data)
    total, active = parameters(sparse), TOP_K * parameters(experts["e0"]) + parameters(sparse.gate)
    dense = {what: train_dense(job, data, size, what) for what, size in (("active", active), ("total", total))}
    with tempfile.TemporaryDirectory(prefix="expertmesh-images-") as temporary:
        folder = Path(temporary)
        layers = [served(data, folder, LAYER, sparse.gate, experts)]
        layers += [
            served(data, folder, what, gates.Fixed([1.0]), {"all": model}) for what, (model, *_) in dense.items()
        ]
        job.tell("starting the cluster")
        with (
            Cluster.start(layers, name=f"images-{os.getpid()}", port=0, state_dir=folder / "state") as cluster,
            Client(cluster.endpoint) as client,
        ):
            rows = data.held_x[:256]

            def measured(
                name: str, model: nn.Module, layer: str, spent: float | None = None, **options: Any
            ) -> Measured:
                return Measured(
                    model=name, quality={"accuracy": accuracy(client, data, layer, **options)},
                    parameters=parameters(model), active=active if model is sparse else parameters(model),
                    flops=flops_of(lambda: model(rows), len(rows)), seconds=spent,
                    rows_per_second=None if options else rate_of(lambda: len(client.forward(layer, rows))),
                )  # fmt: skip

            name = f"sparse layer, top-{TOP_K} of {len(experts)}, as served"
            models = [measured(name, sparse, LAYER, seconds)]
            models += [measured(f"dense, equal {what} parameters", *dense[what]) for what in dense]
            models += [measured(f"expert {e} alone", model, LAYER, allow=[e]) for e, model in experts.items()]
            lines, pictures = told_of(client, data), picture(client, data, job.folder)
            job.tell("training two experts under traffic")
            update = update_live(
                request=lambda: client.call(LAYER, data.held_x[:16]),
                update=lambda: [update_two(client, sparse.gate, data, job)],
                quality=lambda: accuracy(client, data, LAYER),
            )
    return Result(models=tuple(models), update=update, lines=lines, pictures=pictures)


def served(data: Data, folder: Path, name: str, gate: gates.Gate, models: Mapping[str, Any]) -> Layer:
    """A layer of these networks, whose weights are files. Two processes hold them all: they are small."""
    experts = {}
    for number, (own, model) in enumerate(models.items()):
        weights, arguments = folder / f"{name}-{own}.safetensors", (*data.sizes, model.first.out_channels)
        save_module(weights, model)
        rows, pack = TensorSpec(tuple(data.x.shape[1:]), "float32"), f"process{number % 2}"
        experts[own] = Expert("expertmesh.examples.images:Network", arguments, weights=weights, input=rows, pack=pack)
    return Layer(name, gate, experts)


def answers(client: Client, layer: str, x: Tensor, **options: Any) -> Tensor:
    """The scores [T, N] of images, as served."""
    return torch.cat([client.forward(layer, rows, **options) for rows in torch.split(x, 256)])


def accuracy(client: Client, data: Data, layer: str, **options: Any) -> float:
    """The share of the held-out images that are answered rightly, as served."""
    return float((answers(client, layer, data.held_x, **options).argmax(dim=1) == data.held_y).float().mean())


def told_of(client: Client, data: Data) -> tuple[str, ...]:
    """Which classes each expert sees, and three held-out images that are answered wrongly."""
    reply = client.call(LAYER, data.held_x[:4096], return_routing=True)
    y, answer_T = data.held_y[:4096], reply.output.argmax(dim=1)
    lines = []
    for expert in range(int(reply.indices.max()) + 1):
        own = (reply.indices == expert).any(dim=1)
        counts = torch.bincount(y[own], minlength=len(data.names))
        often = ", ".join(data.names[number] for number in counts.argsort(descending=True)[:3] if counts[number])
        lines.append(f"e{expert} answers {float(own.float().mean()):.0%} of the held-out images, most often {often}")
    for row in (answer_T != y).nonzero()[:3, 0].tolist():
        pairs = zip(reply.indices[row].tolist(), reply.weights[row].tolist(), strict=True)
        by = ", ".join(f"e{expert} ({weight:.2f})" for expert, weight in pairs)
        lines.append(f"held-out image {row}: {data.names[y[row]]}, answered {data.names[answer_T[row]]} by {by}")
    return tuple(lines)


def picture(client: Client, data: Data, folder: Path) -> tuple[str, ...]:
    """Plot the confusion matrix of what serves, unless it has too many classes to be read."""
    if len(data.names) > MOST_NAMES:
        return ()
    answer_T = answers(client, LAYER, data.held_x).argmax(dim=1)
    plot_confusion(data.held_y, answer_T, data.names, folder / "confusion.png")
    return ("confusion.png",)


def update_two(client: Client, gate: gates.Gate, data: Data, job: Job) -> SwapOutcome:
    """Go on training the two busiest experts with the images that arrived since, and publish them."""
    x, y = torch.cat([data.x, data.later_x]), torch.cat([data.y, data.later_y])
    with torch.no_grad():
        routing = gate(x)
    busiest = torch.bincount(routing.indices_TK.flatten(), minlength=gate.num_experts).topk(2).indices
    return train_some(client, LAYER, busiest, routing, x, y, steps=5 if job.small else UPDATE_STEPS)


def train_some(
    client: Client,
    layer: str,
    chosen: Tensor,
    routing: gates.Routing,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
) -> SwapOutcome:
    """Train the `chosen` experts of a layer that serves on the rows that `routing` sends them, and publish them.

    What the other experts add to an answer is computed by what serves, which learns nothing.
    """
    learns_TK = torch.isin(routing.indices_TK, chosen)
    rows_N = learns_TK.any(dim=1).nonzero()[:, 0]
    with client.train(layer, optimizer="torch.optim:AdamW", lr=UPDATE_LR) as session:
        learning, serving = RemoteMoE(client, layer, session=session), RemoteMoE(client, layer)
        for step in range(steps):
            rows = rows_N[batch_of(0, step, len(rows_N))]
            indices, weights, learns = routing.indices_TK[rows], routing.weights_TK[rows], learns_TK[rows]
            answer = learning(x[rows], indices=indices.masked_fill(~learns, -1), weights=weights * learns)
            if not bool(learns.all()):
                with torch.no_grad():
                    rest = serving(x[rows], indices=indices.masked_fill(learns, -1), weights=weights * ~learns)
                answer = answer + rest
            torch.autograd.backward(F.cross_entropy(answer, y[rows]))
            session.step()
        return session.publish(experts=[learning.experts[number] for number in chosen.tolist()])


if __name__ == "__main__":
    main("images", sys.argv[1:])
