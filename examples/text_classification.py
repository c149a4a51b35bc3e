"""Text classification: experts of regions of the text, trained in phases, beside dense models of equal cost.

The data are the docstrings of Python's standard library, labelled by package, or with `--data` a CSV file with a column
`label`: every machine has the first, and most people have the second. A text becomes a row of its words' strongest
directions (tf-idf, latent semantic analysis); a random fifth of each label is held out.

Eight small experts are trained by the `Trainer`: first each on the rows of its region and some others, then their gate,
then all together. The dense models get the same rows, the same optimizer and dropout, and as many steps as an expert
has, alone and jointly. The live update trains the two experts that are weakest alone on all rows that the gate sends
them, while they serve.

Shapes: T rows, D features, E experts, C classes, K experts of a row.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh import Client, Cluster, Expert, Layer, RemoteMoE, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.plots import plot_confusion
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.client.reply import Reply
from expertmesh.cluster.demo.features import encode, split
from expertmesh.cluster.demo.text import read_csv, standard_library
from expertmesh.cluster.rpc.swaps import SwapOutcome
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.cluster.training.data import TrainingData
from expertmesh.cluster.training.mixture import LocalMixture
from expertmesh.cluster.training.phases import Phase
from expertmesh.cluster.training.record import Progress, TrainingReport
from expertmesh.cluster.training.trainer import Trainer
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.local import LocalLayer

FEED_FORWARD = "expertmesh.experts.modules:FeedForward"
SPARSE, ACTIVE, TOTAL = "text", "dense-active", "dense-total"
TITLES = {ACTIVE: "dense, equal active parameters", TOTAL: "dense, equal parameters"}
BATCH, RATE, UPDATE_RATE = 128, 1e-3, 1e-4
SUBSETS = {"subsets": "cluster", "nearest": 2, "share": 0.8, "explore": 1.0}
WEIGHT_DECAY = 1.0
JOINT_RATE = 2e-4
SERVED_AT_ONCE = 64


@dataclass(frozen=True)
class Size:
    """How much is trained: experts, their hidden width, experts of a row, and the steps of each phase."""

    experts: int = 8
    hidden: int = 16
    k: int = 2
    alone: int = 525
    gate: int = 350
    joint: int = 350
    dense: int = 875
    rows: int | None = None


FULL = Size()
SMALL = Size(experts=4, hidden=8, alone=6, gate=3, joint=6, dense=12, rows=400)


@dataclass(frozen=True)
class Model:
    """A layer that was trained, with its modules in this process and the seconds that it took."""

    layer: Layer
    local: LocalLayer
    seconds: float

    def measured(self, name: str, accuracy: float, rate: float | None, rows_TD: Tensor) -> Measured:
        """A line of the table: every row meets the gate and K experts of equal size."""
        experts = [parameters(module) for module in self.local.experts.children()]
        gate, k = parameters(self.local.gate), self.local.gate.k or 1
        return Measured(
            model=name,
            quality={"accuracy": accuracy},
            parameters=gate + sum(experts),
            active=gate + k * experts[0],
            flops=flops_of(lambda: self.local(rows_TD), len(rows_TD)),
            seconds=self.seconds,
            rows_per_second=rate,
        )


def run(job: Job) -> Result:
    """Train, serve, compare and update the sparse layer of one seed."""
    size = SMALL if job.small else FULL
    job.tell("reading text")
    data, texts = rows_of(job, size)
    sparse = train_sparse(job, data, size)
    models = {SPARSE: sparse}
    for name, hidden in equal_widths(sparse, data).items():
        models[name] = train_dense(job, name, hidden, data, size)
    job.tell("starting the cluster")
    layers = [model.layer for model in models.values()]
    with (
        tempfile.TemporaryDirectory(prefix="expertmesh-text-") as state,
        Cluster.start(layers, name=f"text-{os.getpid()}", port=0, state_dir=Path(state)) as cluster,
        Client(cluster.endpoint) as client,
    ):
        return served(job, client, models, data, texts)


def rows_of(job: Job, size: Size) -> tuple[TrainingData, list[str]]:
    """The rows to train on and those held out, and the texts of the latter."""
    corpus = standard_library() if job.data is None else read_csv(job.data)
    parts = split(corpus, seed=job.seed, rows_limit=size.rows)
    rows = encode(corpus, parts, seed=job.seed)
    data = TrainingData(rows.train_x_TD, rows.train_y_T, rows.held_x_TD, rows.held_y_T, rows.names)
    return data, [corpus.texts[place] for place in parts.held_out]


def train_sparse(job: Job, data: TrainingData, size: Size) -> Model:
    """Experts of regions of the rows, then their gate, then all jointly."""
    gate = gates.TopK(data.x.shape[1], size.experts, k=size.k, bias=True)
    layer = Layer(SPARSE, gate, {f"e{number}": feed_forward(data, size.hidden) for number in range(size.experts)})
    phases = [
        phase("experts", size.alone, RATE, data),
        phase("gate", size.gate, RATE, data),
        phase("joint", size.joint, JOINT_RATE, data),
    ]
    return train(job, layer, data, phases, **SUBSETS)


def train_dense(job: Job, name: str, hidden: int, data: TrainingData, size: Size) -> Model:
    """One model on all rows: a layer of a single expert."""
    layer = Layer(name, gates.Fixed([1.0]), {"dense": feed_forward(data, hidden)})
    return train(job, layer, data, [phase("experts", size.dense, RATE, data)])


def phase(kind: str, steps: int, rate: float, data: TrainingData) -> Phase:
    """A phase of about so many steps, in whole passes over the rows."""
    return Phase(kind=kind, epochs=max(1, round(steps * BATCH / len(data.x))), lr=rate, schedule="one_cycle")


def train(job: Job, layer: Layer, data: TrainingData, phases: Sequence[Phase], **subsets: Any) -> Model:
    """Train a layer in the job's folder, from its last checkpoint on; its experts become files to be served."""
    folder = job.folder / layer.name
    trainer = Trainer(
        layer, data, phases=phases, batch=BATCH, dropout=0.5, balance=0.0, seed=job.seed, folder=folder,
        arguments={"weight_decay": WEIGHT_DECAY},
        **(subsets or {"subsets": "all"}),
    )  # fmt: skip

    def tell(told: Progress) -> None:
        if told.step * told.epochs == told.epoch * told.steps:
            job.tell(f"{layer.name}: {told}")

    report = trainer.fit(tell)
    files = trainer.write(folder)
    mixture = trainer.mixture
    if not isinstance(mixture, LocalMixture):
        raise TypeError("without a connection, a trainer has its experts in this process")
    experts = {
        name: replace(expert, weights=files[f"{layer.name}/{name}"], pack=f"{layer.name}-{number % 2}")
        for number, (name, expert) in enumerate(layer.experts.items())
    }
    local = LocalLayer(trainer.gate, dict(zip(experts, mixture.modules, strict=True))).eval()
    return Model(replace(layer, gate=trainer.gate, experts=experts), local, seconds_of(report, trainer.seen_TE))


def feed_forward(data: TrainingData, hidden: int) -> Expert:
    """A network of one hidden layer, declared so that any process can build it."""
    width, classes = data.x.shape[1], len(data.names)
    return Expert(
        FEED_FORWARD,
        args=(width, hidden),
        kwargs={"out_features": classes},
        input=TensorSpec((width,), "float32"),
        output=TensorSpec((classes,), "float32"),
    )


def equal_widths(sparse: Model, data: TrainingData) -> dict[str, int]:
    """The hidden widths at which a dense model has as many parameters as a row meets in the sparse one, and as all."""
    width, classes = data.x.shape[1], len(data.names)
    each = parameters(sparse.local.experts) / len(sparse.layer.experts)
    gate, k = parameters(sparse.local.gate), sparse.local.gate.k or 1
    wanted = {ACTIVE: gate + k * each, TOTAL: gate + len(sparse.layer.experts) * each}
    return {name: max(1, round((count - classes) / (width + 1 + classes))) for name, count in wanted.items()}


def seconds_of(report: TrainingReport, seen_TE: Tensor) -> float:
    """The seconds of all epochs, also of those before a resume."""
    pairs = {"experts": int(seen_TE.sum())}
    return sum(pairs.get(epoch.phase, len(seen_TE)) / epoch.rows_per_second for epoch in report.epochs)


def accuracy(answers_TC: Tensor, y_T: Tensor) -> float:
    """The share of rows whose label has the highest score."""
    return float((answers_TC.argmax(dim=1) == y_T).float().mean())


def served(job: Job, client: Client, models: dict[str, Model], data: TrainingData, texts: Sequence[str]) -> Result:
    """Measure every model as the cluster serves it, and update the sparse one meanwhile."""
    x_TD, y_T = data.held_x, data.held_y
    job.tell("sending the held-out rows")
    measured = []
    for name, model in models.items():
        answers_TC = ServedLayer(client, name)(x_TD)
        if name == SPARSE:
            plot_confusion(y_T, answers_TC.argmax(dim=1), data.names, job.folder / "confusion.png")
        rate = rate_of(partial(rows_answered, client, name, x_TD[:SERVED_AT_ONCE]))
        title = TITLES.get(name, f"sparse layer, top-{model.local.gate.k} of {len(model.layer.experts)}, as served")
        measured.append(model.measured(title, accuracy(answers_TC, y_T), rate, x_TD))
    sparse = models[SPARSE]
    accuracies: dict[str, float] = {}
    for name in sparse.layer.experts:
        measured.append(alone(client, name, sparse, data))
        accuracies[name] = measured[-1].quality["accuracy"]
    lines = answered(client, data, texts)
    weakest = sorted(accuracies, key=accuracies.__getitem__)[:2]
    job.tell(f"training {' and '.join(weakest)} while they serve")
    update = update_live(
        request=lambda: client.call(SPARSE, x_TD[:SERVED_AT_ONCE]),
        update=lambda: [learn_more(job, client, sparse, data, weakest)],
        quality=lambda: accuracy(ServedLayer(client, SPARSE)(x_TD), y_T),
    )
    return Result(models=tuple(measured), update=update, lines=lines, pictures=("confusion.png",))


def rows_answered(client: Client, layer: str, x_TD: Tensor) -> int:
    """Send some rows; returns how many were answered."""
    return len(client.call(layer, x_TD).output)


def alone(client: Client, name: str, sparse: Model, data: TrainingData) -> Measured:
    """An expert by itself, which gets all rows."""
    module = sparse.local.experts.get_submodule(name)
    answers_TC = ServedLayer(client, SPARSE, top_k=1, allow=[f"{SPARSE}/{name}"])(data.held_x)
    return Measured(
        model=f"expert {name} alone",
        quality={"accuracy": accuracy(answers_TC, data.held_y)},
        parameters=parameters(module),
        active=parameters(module),
        flops=flops_of(lambda: module(data.held_x), len(data.held_x)),
    )


def learn_more(job: Job, client: Client, sparse: Model, data: TrainingData, names: Sequence[str]) -> SwapOutcome:
    """Train two experts of the running layer on all rows that the gate sends them, and publish them.

    The other experts answer as they are, in this process.
    """
    local, steps = sparse.local, 5 if job.small else 100
    chosen_E = torch.tensor([name in names for name in local.names])
    with torch.no_grad():
        routing = local.gate(data.x)
    theirs_TK = chosen_E[routing.indices_TK]
    rows_N = theirs_TK.any(dim=1).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(job.seed)
    with client.train(SPARSE, optimizer="torch.optim:AdamW", lr=UPDATE_RATE, seed=job.seed) as session:
        moe = RemoteMoE(client, SPARSE, session=session)
        for _ in range(steps):
            batch = rows_N[torch.randint(len(rows_N), (BATCH,), generator=generator)]
            x, indices_TK, weights_TK = data.x[batch], routing.indices_TK[batch], routing.weights_TK[batch]
            others = Routing(indices_TK.masked_fill(theirs_TK[batch], -1), weights_TK)
            with torch.no_grad():
                fixed_TC = local.with_routing(x, others).output
            learned_TC = moe(x, indices=indices_TK.masked_fill(~theirs_TK[batch], -1), weights=weights_TK)
            torch.autograd.backward(F.cross_entropy(learned_TC + fixed_TC, data.y[batch]))
            session.step()
        return session.publish(experts=[f"{SPARSE}/{name}" for name in names])


def answered(client: Client, data: TrainingData, texts: Sequence[str]) -> tuple[str, ...]:
    """Some held-out texts, with label and answer, and the experts that made it."""
    lines = []
    for row, label, text in list(zip(data.held_x, data.held_y.tolist(), texts, strict=True))[:5]:
        reply: Reply = client.call(SPARSE, row[None])
        by = ", ".join(sorted(id for id in reply.versions if id.rpartition("/")[2] not in ("gate", "layer")))
        found = data.names[int(reply.output.argmax())]
        lines.append(f"{text[:60]!r}: label {data.names[label]}, answer {found}, by {by}")
    return tuple(lines)


if __name__ == "__main__":
    main("text_classification", sys.argv[1:])
