"""Image and text under one gate: experts of unlike inputs, and answers where one of the two is missing, flagged.

The default data are the handwritten digits that scikit-learn ships, each under a stain that hides a quarter of it, with
a sentence about it such as "the clerk noted an odd number and five or more". The digits are real; stains and sentences
are made by rule, and a tenth of the sentences tell of another digit. So neither image nor text is enough alone. With
--data it is a CSV file with the columns image (the path of a file), text and label, where a field may be empty.

All rows of a layer have one shape, and experts of this layer want unlike ones: so a row is the pixels and the words
side by side, and each expert takes its part of it. What a request does not have, it sends as NaN, as tables do. An
expert whose part is NaN answers NaN, which is for the layer an expert that gave no answer: its declared policy
(`on_missing="renormalize"`) leaves that expert out, and the reply is flagged with its name and the share of gate weight
that is lost, row by row. The same policy covers an expert whose process is lost, and a row with neither part is
refused. The gate sees both parts, and always asks one expert of each.

An expert alone has no answer where its part is missing, which counts as wrong.

Shapes: T rows, E experts, I experts of a kind, N classes.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import Client, Cluster, Expert, ExpertMeshError, Layer, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.rpc.swaps import SwapOutcome
from expertmesh.examples.data.captioned_images import digits_with_sentences, read_pairs
from expertmesh.examples.data.two_parts import Shape
from expertmesh.examples.images import Network, train_some, whole
from expertmesh.experts.training.k_means import k_means
from expertmesh.experts.weights.files import save_module
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.balance import load_balance_loss
from expertmesh.router.mixture.local import LocalLayer

OPTIONS = {"side": "16", "width": "4"}
LAYER = "modalities"
HELD_OUT, LATER = 0.4, 0.2
EXPERTS = 4
"""Experts of each kind."""
HIDDEN = 16
STEPS, BATCH, LR, LR_OF_EXPERTS = 1200, 64, 1e-2, 3e-3
WITHOUT = 0.2
"""The share of the training rows without an image, and that without a text."""
UPDATE_STEPS = 100
BALANCE = 0.01
ONE_OF_EACH = 1000.0


class ImageExpert(nn.Module):
    """Scores of the classes [T, N] from the image of a row, NaN where there is none."""

    def __init__(self, shape: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.shape = Shape(*shape)
        self.network = Network(self.shape.channels, self.shape.side, classes, width)

    def forward(self, x: Tensor) -> Tensor:
        images, missing = self.shape.image_of(x)
        scores_TN: Tensor = self.network(images)
        return scores_TN.masked_fill(missing, math.nan)


class TextExpert(nn.Module):
    """Scores of the classes [T, N] from the words of a row, NaN where there is no text."""

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.shape = Shape(*shape)
        self.words = self.shape.words()
        self.hidden = nn.Linear(self.shape.embedded, HIDDEN)
        self.scores = nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        words, missing = self.shape.words_of(x)
        scores_TN: Tensor = self.scores(F.relu(self.hidden(self.words(words))))
        return scores_TN.masked_fill(missing, math.nan)


class JointScores(nn.Module):
    """The gate's scores [T, E] from image and text together; the best of each kind come before all others."""

    def __init__(self, shape: Sequence[int], experts: int) -> None:
        super().__init__()
        self.shape = Shape(*shape)
        self.words = self.shape.words()
        self.linear = nn.Linear(self.shape.channels * 16 + self.shape.embedded, experts)

    def joint(self, x: Tensor) -> Tensor:
        """The features of both parts: the image averaged to 4x4 pixels, and the sum of the words."""
        glance = F.adaptive_avg_pool2d(self.shape.image_of(x)[0], 4).flatten(1)
        return torch.cat([glance, self.words(self.shape.words_of(x)[0])], dim=1)

    def raw(self, x: Tensor) -> Tensor:
        """The scores by themselves."""
        scores_TE: Tensor = self.linear(self.joint(x))
        return scores_TE

    @torch.no_grad()
    def begin_as(self, one: JointScores, x: Tensor, seed: int) -> None:
        """Begin with the scores of a gate of one expert a kind, and prefer in each kind the expert of a region c."""
        self.words.load_state_dict(one.words.state_dict())
        centres = k_means(one.joint(x), self.linear.out_features // 2, seed=seed).centres_KD
        weight, bias = (
            values.repeat_interleave(len(centres), dim=0) for values in (one.linear.weight, one.linear.bias)
        )
        self.linear.weight.copy_(weight + centres.repeat(2, 1))
        self.linear.bias.copy_(bias - (centres**2).sum(dim=1).repeat(2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        scores_TE = self.raw(x)
        best = [half.argmax(dim=1, keepdim=True) for half in scores_TE.chunk(2, dim=1)]
        chosen = torch.cat([best[0], best[1] + scores_TE.shape[1] // 2], dim=1)
        return scores_TE + torch.zeros_like(scores_TE).scatter(1, chosen, ONE_OF_EACH)


class Joined(nn.Module):
    """The dense model: image, words, and what of them is missing are added up in one hidden layer."""

    def __init__(self, shape: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.shape = Shape(*shape)
        self.network = Network(self.shape.channels, self.shape.side, 4 * width, width)
        self.words = self.shape.words()
        self.others = nn.Linear(self.shape.embedded + 2, 4 * width)
        self.scores = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        (images, no_image), (words, no_text) = self.shape.image_of(x), self.shape.words_of(x)
        others = self.others(torch.cat([self.words(words), no_image, no_text], dim=1))
        scores_TN: Tensor = self.scores(F.relu(self.network(images) + others))
        return scores_TN


@dataclass(frozen=True)
class Data:
    """Rows for training, those that arrive later, and those held out, with their classes."""

    shape: Shape
    names: tuple[str, ...]
    x: Tensor
    y: Tensor
    later_x: Tensor
    later_y: Tensor
    held_x: Tensor
    held_y: Tensor

    def held(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The held-out rows and classes as they are, without their texts, and without their images."""
        parts = {"accuracy": (self.held_x, self.held_y)}
        for figure, part, other in (
            ("image only", slice(0, self.shape.pixels), slice(self.shape.pixels, None)),
            ("text only", slice(self.shape.pixels, None), slice(0, self.shape.pixels)),
        ):
            has = ~self.held_x[:, part].isnan().any(dim=1)
            x = self.held_x[has]
            x[:, other] = math.nan
            parts[figure] = (x, self.held_y[has])
        return parts


def read(job: Job) -> Data:
    """Read the pairs, and divide those of each class with the seed. Raises ConfigError."""
    if job.data is None:
        pairs, more = digits_with_sentences(), {"buckets": 256, "embedded": 4}
    else:
        pairs, more = read_pairs(job.data, whole(job, "side", 8, 256)), {}
    shape = Shape(*pairs.images.shape[1:3], **more)
    told = zip(pairs.images, pairs.texts, pairs.seen.tolist(), pairs.told.tolist(), strict=True)
    x = torch.stack([shape.row(image if seen else None, text if said else None) for image, text, seen, said in told])
    known, held = train_test_split(range(len(x)), test_size=HELD_OUT, stratify=pairs.labels, random_state=job.seed)
    if job.small:
        known, held = known[:400], held[:200]
    first = round(len(known) * (1 - LATER / (1 - HELD_OUT)))
    parts = [part for rows in (known[:first], known[first:], held) for part in (x[rows], pairs.labels[rows])]
    return Data(shape, pairs.names, *parts)


def layer_of(data: Data, experts: dict[str, nn.Module]) -> LocalLayer:
    """A layer of these experts, as many of each kind, under a new gate, with the policy that it will serve under."""
    arguments = [list(astuple(data.shape)), len(experts)]
    gate = gates.Custom("expertmesh.examples.modalities:JointScores", len(experts), 2, args=arguments)
    return LocalLayer(gate, experts, on_missing="renormalize", max_lost_mass=1.0)


def scores_of(layer: LocalLayer) -> JointScores:
    """The scores of the layer's gate."""
    return cast(JointScores, layer.gate.scorer)


def train(job: Job, data: Data) -> tuple[LocalLayer, dict[str, nn.Module], float]:
    """The sparse layer, its experts, and the seconds of the training: one expert of each kind first, then copies."""
    steps, copies = (STEPS // 40, 2) if job.small else (STEPS, EXPERTS)
    torch.manual_seed(job.seed)
    shape, classes = astuple(data.shape), len(data.names)
    pair: dict[str, nn.Module] = {
        "image": ImageExpert(shape, classes, whole(job, "width", 1, 256)),
        "text": TextExpert(shape, classes),
    }
    one = layer_of(data, pair)
    seconds = fit_layer(job, data, one, "pair", range(steps // 2))
    experts = {f"{kind}{n}": copy.deepcopy(expert) for kind, expert in pair.items() for n in range(copies)}
    layer = layer_of(data, experts)
    scores_of(layer).begin_as(scores_of(one), data.x, job.seed)
    return layer, experts, seconds + fit_layer(job, data, layer, "sparse", range(steps // 2, steps))


def fit_layer(job: Job, data: Data, layer: LocalLayer, name: str, steps: range) -> float:
    """Train gate and experts together; the load of the experts of each kind is balanced by a loss."""

    def loss_of(step: int) -> Tensor:
        x, y = batch_of(job.seed, steps[step], data)
        loss = F.cross_entropy(layer(x), y)
        for half_TI in scores_of(layer).raw(x).chunk(2, dim=1):
            best = Routing(half_TI.argmax(dim=1, keepdim=True), torch.ones(len(x), 1))
            loss = loss + BALANCE * load_balance_loss(half_TI.softmax(dim=1), best)
        return loss

    path = job.folder / f"{name}.safetensors"
    lr = LR_OF_EXPERTS if name == "sparse" else LR
    return fit(layer, loss_of, steps=len(steps), lr=lr, checkpoint=path, tell=job.tell)


def train_dense(job: Job, data: Data, size: int, name: str) -> tuple[Joined, str, float]:
    """One model of at least so many parameters, trained for as many steps on the same rows."""
    torch.manual_seed(job.seed)
    sizes = (Joined(astuple(data.shape), len(data.names), width) for width in count(1))
    model = next(model for model in sizes if parameters(model) >= size)

    def loss_of(step: int) -> Tensor:
        x, y = batch_of(job.seed, step, data)
        return F.cross_entropy(model(x), y)

    steps, path = STEPS // 40 if job.small else STEPS, job.folder / f"dense-{name}.safetensors"
    return model, name, fit(model, loss_of, steps=steps, lr=LR, checkpoint=path, tell=job.tell)


def batch_of(seed: int, step: int, data: Data) -> tuple[Tensor, Tensor]:
    """The rows and classes of a step: some without their image, some without their text, never without both."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(0, len(data.x), (BATCH,), generator=generator)
    x, drawn = data.x[rows], torch.rand(BATCH, generator=generator)
    no_image, no_text = data.shape.image_of(x)[1][:, 0], data.shape.words_of(x)[1][:, 0]
    x[(drawn < WITHOUT) & ~no_text, : data.shape.pixels] = math.nan
    x[(drawn > 1 - WITHOUT) & ~no_image, data.shape.pixels :] = math.nan
    return x, data.y[rows]


def run(job: Job) -> Result:
    """Train, serve, measure and update for one seed."""
    torch.set_num_threads(1)  # for models as small as these, more only wait for each other
    data = read(job)
    sparse, experts, seconds = train(job, data)
    total = parameters(sparse)
    active = parameters(experts["image0"], experts["text0"], sparse.gate)
    dense = {what: train_dense(job, data, size, what) for what, size in (("active", active), ("total", total))}
    with tempfile.TemporaryDirectory(prefix="expertmesh-modalities-") as temporary:
        folder = Path(temporary)
        layers = [served(data, folder, LAYER, sparse.gate, experts)]
        layers += [
            served(data, folder, what, gates.Fixed([1.0]), {"all": model}) for what, (model, *_) in dense.items()
        ]
        job.tell("starting the cluster")
        with (
            Cluster.start(layers, name=f"modalities-{os.getpid()}", port=0, state_dir=folder / "state") as cluster,
            Client(cluster.endpoint) as client,
        ):
            rows = data.held_x[:256]

            def measured(
                name: str, model: nn.Module, layer: str, spent: float | None = None, alone: str = ""
            ) -> Measured:
                return Measured(
                    model=name, quality=quality(client, data, layer, alone), parameters=parameters(model),
                    active=active if model is sparse else parameters(model),
                    flops=flops_of(lambda: model(rows), len(rows)), seconds=spent,
                    rows_per_second=None if alone else rate_of(lambda: len(client.forward(layer, rows))),
                )  # fmt: skip

            models = [measured(f"sparse layer, top-2 of {len(experts)}, as served", sparse, LAYER, seconds)]
            models += [measured(f"dense, equal {what} parameters", *dense[what]) for what in dense]
            models += [measured(f"expert {e} alone", model, LAYER, alone=e) for e, model in experts.items()]
            lines = told_of(client, data)
            mixed = torch.cat([x[:8] for x, _ in data.held().values()])
            job.tell("training two experts under traffic")
            update = update_live(
                request=lambda: client.call(LAYER, mixed),
                update=lambda: [update_two(client, sparse.gate, data, job)],
                quality=lambda: quality(client, data, LAYER)["accuracy"],
            )
    return Result(models=tuple(models), update=update, lines=lines)


def served(data: Data, folder: Path, name: str, gate: gates.Gate, models: Mapping[str, Any]) -> Layer:
    """A layer of these models, whose weights are files, with the policy for what is missing."""
    experts = {}
    for number, (own, model) in enumerate(models.items()):
        weights, arguments = folder / f"{name}-{own}.safetensors", [list(astuple(data.shape)), len(data.names)]
        if not isinstance(model, TextExpert):
            arguments.append(model.network.first.out_channels)
        save_module(weights, model)
        rows, pack = TensorSpec((data.shape.width,), "float32"), f"process{number % 2}"
        factory = f"expertmesh.examples.modalities:{type(model).__name__}"
        experts[own] = Expert(factory, tuple(arguments), weights=weights, input=rows, pack=pack)
    return Layer(name, gate, experts, on_missing="renormalize", max_lost_mass=1.0)


def quality(client: Client, data: Data, layer: str, alone: str = "") -> dict[str, float]:
    """The accuracy on the held-out rows as served, with both parts and with one, or that of an expert alone."""
    figures = {}
    for figure, (x, y) in data.held().items():
        has = torch.ones(len(x), dtype=torch.bool)
        if alone:
            has = ~(data.shape.image_of(x) if alone.startswith("image") else data.shape.words_of(x))[1][:, 0]
        options = {"allow": [alone]} if alone else {}
        parts = [client.forward(layer, rows, **options) for rows in torch.split(x[has], 256) if len(rows)]
        right = int((torch.cat(parts).argmax(dim=1) == y[has]).sum()) if parts else 0
        figures[figure] = right / max(1, len(x))
    return figures


def told_of(client: Client, data: Data) -> tuple[str, ...]:
    """A held-out row as it is answered with both parts, with either, and with neither; flags are those of the reply."""
    lines = []
    for figure, (x, y) in data.held().items():
        reply = client.call(LAYER, x[:1])
        label, answer = data.names[int(y[0])], data.names[int(reply.output.argmax())]
        by = ", ".join(id for id in reply.versions if not id.endswith(("/gate", "/layer")))
        told = "both parts" if figure == "accuracy" else figure
        flag = f", flagged: {', '.join(reply.missing)} missing, {reply.max_lost_mass:.0%} of the gate weight lost"
        lines.append(f"{told}: label {label}, answered {answer} by {by}{flag if reply.degraded else ''}")
    try:
        client.call(LAYER, torch.full((1, data.shape.width), math.nan))
    except ExpertMeshError as error:
        lines.append(f"neither part: refused, {type(error).__name__}: {error}")
    return tuple(lines)


def update_two(client: Client, gate: gates.Gate, data: Data, job: Job) -> SwapOutcome:
    """Go on training the busiest expert of each kind with the rows that arrived since, and publish both.

    Rows are those with both parts: an answer of NaN teaches nothing.
    """
    x, y = torch.cat([data.x, data.later_x]), torch.cat([data.y, data.later_y])
    whole_T = ~x.isnan().any(dim=1)
    x, y = x[whole_T], y[whole_T]
    with torch.no_grad():
        routing = gate(x)
    images, texts = torch.bincount(routing.indices_TK.flatten(), minlength=gate.num_experts).chunk(2)
    busiest = torch.stack([images.argmax(), texts.argmax() + len(images)])
    return train_some(client, LAYER, busiest, routing, x, y, steps=5 if job.small else UPDATE_STEPS)


if __name__ == "__main__":
    main("modalities", sys.argv[1:])
