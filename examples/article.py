"""The flow of an article: preprocess, sparse rows? sub-models, else fewer dimensions; share parameters; predict.

An article on sparse expert models draws this flow, and runs none of it: input -> preprocess -> is it sparse? -> if so
train sub-models, else reduce the dimensions -> share parameters -> predict -> result. Here each arrow is a function:

* The rows are texts, the docstrings of Python's standard library by package or with `--data` a CSV file with a column
  `label`: cleaned, without stop words and punctuation, tokenised, and encoded by tf-idf.
* The share of zeros in the rows decides which branch the flow takes (`--set sparse_from=0.9`); the other one is run as
  well, and stands beside it in the table.
* Sparse rows: sub-models that begin as one network are trained, each on the rows of its region. What they have in
  common is then shared: the hidden units that differ least become those of the fused sub-models, and one expert of them
  that is always on takes the place of all copies.
* Else: the rows are reduced by truncated SVD, one network is trained on them, and its hidden units are split into
  experts. The same gate is trained on both, and then all together.

Shapes: T rows, D features, E experts, F hidden units, C classes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import Client, Cluster, ConfigError, Expert, Layer, RemoteMoE, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.demo.features import TOKEN, split
from expertmesh.cluster.demo.text import Corpus, read_csv, standard_library
from expertmesh.cluster.rpc.swaps import SwapOutcome
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.cluster.training.data import TrainingData
from expertmesh.cluster.training.mixture import LocalMixture
from expertmesh.cluster.training.phases import Phase
from expertmesh.cluster.training.record import Progress
from expertmesh.cluster.training.trainer import Trainer
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.transform import split as splitting
from expertmesh.experts.transform.feed_forward import FeedForwardExpert, unit_parameters
from expertmesh.experts.transform.fuse import fuse
from expertmesh.experts.transform.share import share
from expertmesh.experts.weights.files import save_module
from expertmesh.router.mixture.local import LocalLayer

OPTIONS = {"sparse_from": "0.9"}
FEED_FORWARD = "expertmesh.experts.modules:FeedForward"
SPARSE, REDUCED, ACTIVE, TOTAL = "sub-models", "reduced", "dense-active", "dense-total"
TITLES = {ACTIVE: "dense, equal active parameters", TOTAL: "dense, equal parameters"}
BATCH, RATE, DROPOUT = 128, 1e-3, 0.5
SERVED_AT_ONCE = 64


@dataclass(frozen=True)
class Size:
    """How much is trained: features, experts, hidden units of a sub-model and how many of them are shared, epochs."""

    words: int = 1024
    dimensions: int = 128
    experts: int = 8
    hidden: int = 16
    common: int = 8
    k: int = 2
    alone: int = 15
    joint: int = 10
    rows: int | None = None


FULL = Size()
SMALL = Size(words=128, dimensions=16, experts=4, hidden=8, common=4, alone=2, joint=2, rows=400)


@dataclass(frozen=True)
class Branch:
    """A branch of the flow: its rows, the layer that it ends in, the seconds of its training, and what it did."""

    title: str
    data: TrainingData
    local: LocalLayer
    seconds: float
    told: tuple[str, ...] = ()


def run(job: Job) -> Result:
    """Go through the flow of one seed, with both branches."""
    size = SMALL if job.small else FULL
    job.tell("preprocessing")
    threshold = share_of(job.options.get("sparse_from", OPTIONS["sparse_from"]))
    data = preprocessed(standard_library() if job.data is None else read_csv(job.data), size, job.seed)
    zeros = float((data.x == 0).float().mean())
    branches = {SPARSE: sub_models(job, data, size), REDUCED: reduced(job, data, size)}
    order = (SPARSE, REDUCED) if zeros >= threshold else (REDUCED, SPARSE)
    taken = branches[order[0]]
    denses = {
        name: dense(job, name, hidden, taken.data, size.alone + size.joint)
        for name, hidden in equal_widths(taken).items()
    }
    told = (
        f"{zeros:.1%} of the values are zeros, of {threshold:.1%} that make rows sparse: the flow takes {taken.title}"
    )
    with tempfile.TemporaryDirectory(prefix="expertmesh-article-") as state:
        models = {name: branches[name] for name in order} | denses
        layers = [served_layer(name, model, job.folder / name) for name, model in models.items()]
        job.tell("starting the cluster")
        with (
            Cluster.start(layers, name=f"article-{os.getpid()}", port=0, state_dir=Path(state)) as cluster,
            Client(cluster.endpoint) as client,
        ):
            return result(job, client, models, (told, *branches[SPARSE].told, *branches[REDUCED].told))


def share_of(text: str) -> float:
    """The share of zeros from which on rows are sparse."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise ConfigError(f"--set sparse_from={text}: it must be a share of zeros between 0 and 1, as 0.9")
    return found


def preprocessed(corpus: Corpus, size: Size, seed: int) -> TrainingData:
    """Texts as rows of tf-idf [T, D], each of length √D: the most frequent words, none of them a stop word."""
    parts = split(corpus, seed=seed, rows_limit=size.rows)
    encoder = TfidfVectorizer(
        strip_accents="unicode", stop_words="english", token_pattern=TOKEN, max_features=size.words, sublinear_tf=True
    )

    def rows(places: Sequence[int], encode: Callable[[list[str]], Any]) -> tuple[Tensor, Tensor]:
        x_TD = torch.from_numpy(encode([corpus.texts[place] for place in places]).toarray().astype(np.float32))
        return x_TD * x_TD.shape[1] ** 0.5, torch.tensor([corpus.labels[place] for place in places])

    try:
        x_TD, y_T = rows(parts.train, encoder.fit_transform)
    except ValueError as error:
        raise ConfigError(f"{corpus.source}: no words are left after cleaning: {error}") from error
    return TrainingData(x_TD, y_T, *rows(parts.held_out, encoder.transform), corpus.names)


def sub_models(job: Job, data: TrainingData, size: Size) -> Branch:
    """Train sub-models on the rows of their regions, share what they have in common, and train all with their gate."""
    folder = job.folder / SPARSE
    folder.mkdir(exist_ok=True)
    torch.manual_seed(job.seed)
    first = folder / "first.safetensors"
    save_module(first, network(data, size.hidden))
    experts = {f"e{number}": declared(data, size.hidden, first) for number in range(size.experts)}
    gate = gates.TopK(data.x.shape[1], size.experts, k=size.k, bias=True)
    phases = [Phase(kind="experts", epochs=size.alone, lr=RATE, schedule="one_cycle")]
    subsets: Mapping[str, Any] = {"subsets": "cluster", "nearest": 2, "share": 0.4}
    trainer = Trainer(
        Layer(SPARSE, gate, experts), data, phases=phases, batch=BATCH, dropout=DROPOUT, seed=job.seed,
        folder=folder / "alone", **subsets,
    )  # fmt: skip

    def tell(told: Progress) -> None:
        if told.step * told.epochs == told.epoch * told.steps:
            job.tell(f"sub-models: {told}")

    report = trainer.fit(tell)
    if not isinstance(trainer.mixture, LocalMixture):
        raise TypeError("without a connection, a trainer has its experts in this process")
    load_E = trainer.seen_TE.sum(dim=0)
    models = [module for module in trainer.mixture.modules if isinstance(module, FeedForward)]
    common, rests, told = shared_of(models, load_E, data, size)
    local = LocalLayer(trainer.gate, {f"e{number}": rest for number, rest in enumerate(rests)}, shared=common)
    seconds = sum(int(load_E.sum()) / epoch.rows_per_second for epoch in report.epochs)
    seconds += trained(job, SPARSE, local, data, size.joint)
    return Branch(f"sub-models that share, top-{size.k} of {size.experts}", data, local, seconds, told)


def shared_of(
    experts: Sequence[FeedForward], load_E: Tensor, data: TrainingData, size: Size
) -> tuple[FeedForwardExpert, list[FeedForwardExpert], tuple[str, ...]]:
    """An expert of the hidden units that differ least among the sub-models, and what is left of each.

    In all sub-models such units become those of the fused ones, which are the mean by numbers of rows.
    """
    fused, _ = fuse(experts, "load", load=load_E)
    if not isinstance(fused, FeedForward):
        raise TypeError("what is fused of networks is one")
    mean_FP = unit_parameters(fused)
    differing_F = torch.stack([(unit_parameters(expert) - mean_FP).norm(dim=1) for expert in experts]).sum(dim=0)
    alike = differing_F.argsort()[: size.common]
    with torch.no_grad():
        for expert in experts:
            expert.up_proj.weight[alike] = fused.up_proj.weight[alike]
            expert.up_proj.bias[alike] = fused.up_proj.bias[alike]
            expert.down_proj.weight[:, alike] = fused.down_proj.weight[:, alike]
    common, rests, sharing = share(experts, rows=data.held_x)
    told = (
        f"sub-models: {len(experts)} of {size.hidden} hidden units, accuracy "
        f"{accuracy(fused(data.held_x), data.held_y):.4g} when fused into one; {sharing.shared_units} units shared: "
        f"{sharing.parameters.before:,} parameters became {sharing.parameters.after:,}",
    )
    return common, rests, told


def reduced(job: Job, data: TrainingData, size: Size) -> Branch:
    """Reduce the dimensions, train one network on these rows, and split it into experts, trained with their gate."""
    dimensions = min(size.dimensions, data.x.shape[1] - 1)
    reduction = TruncatedSVD(dimensions, random_state=job.seed).fit(data.x.numpy())

    def rows(x_TD: Tensor) -> Tensor:
        less_TD = torch.from_numpy(np.ascontiguousarray(reduction.transform(x_TD.numpy()), dtype=np.float32))
        scaled_TD: Tensor = F.normalize(less_TD) * dimensions**0.5
        return scaled_TD

    less = TrainingData(rows(data.x), data.y, rows(data.held_x), data.held_y, data.names)
    torch.manual_seed(job.seed)
    network_of_all = network(less, size.hidden * 2)
    seconds = trained(job, f"{REDUCED}-whole", network_of_all, less, size.alone)
    experts, splitting_report = splitting.split(
        network_of_all, size.experts, by="activations", rows=less.x, k=size.k, seed=job.seed
    )
    gate = gates.TopK(dimensions, size.experts, k=size.k, bias=True, scale=float(size.experts))
    local = LocalLayer(gate, {f"e{number}": expert for number, expert in enumerate(experts)})
    seconds += trained(job, REDUCED, local, less, size.joint)
    kept = float(reduction.explained_variance_ratio_.sum())
    told = (
        f"reduced: {data.x.shape[1]} dimensions became {dimensions} with {kept:.1%} of the variance; the network on "
        f"them, accuracy {accuracy(network_of_all(less.held_x), less.held_y):.4g}, was split into {size.experts} "
        f"experts (the best {size.k} of a row are {splitting_report.relative_l2_of_k or 0:.2g} away from all)",
    )
    return Branch(f"fewer dimensions, split, top-{size.k} of {size.experts}", less, local, seconds, told)


def dense(job: Job, name: str, hidden: int, data: TrainingData, epochs: int) -> Branch:
    """One network on all rows, as a layer of a single expert."""
    torch.manual_seed(job.seed)
    local = LocalLayer(gates.Fixed([1.0]), {"dense": network(data, hidden)})
    return Branch(TITLES[name], data, local, trained(job, name, local, data, epochs))


def trained(job: Job, name: str, model: nn.Module, data: TrainingData, epochs: int) -> float:
    """Train a model of this process on all rows, from its last checkpoint on; returns the seconds of it."""
    each = -(-len(data.x) // BATCH)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step // each)
        rows_B = torch.randperm(len(data.x), generator=generator)[step % each * BATCH :][:BATCH]
        return F.cross_entropy(model(F.dropout(data.x[rows_B], DROPOUT)), data.y[rows_B])

    checkpoint = job.folder / f"{name}.safetensors"
    return fit(model, loss_of, steps=epochs * each, lr=RATE, checkpoint=checkpoint, tell=job.tell)


def network(data: TrainingData, hidden: int) -> FeedForward:
    """A network of one hidden layer."""
    return FeedForward(data.x.shape[1], hidden, out_features=len(data.names))


def declared(data: TrainingData, hidden: int, weights: Path) -> Expert:
    """The same as a declaration, with its weights in a file."""
    width, classes = data.x.shape[1], len(data.names)
    return Expert(
        FEED_FORWARD,
        args=(width, hidden),
        kwargs={"out_features": classes},
        weights=weights,
        input=TensorSpec((width,), "float32"),
        output=TensorSpec((classes,), "float32"),
        pack="all",
    )


def equal_widths(branch: Branch) -> dict[str, int]:
    """The hidden widths at which a dense model has as many parameters as a row meets in the layer, and as all."""
    width, classes = branch.data.x.shape[1], len(branch.data.names)
    counts = {ACTIVE: active(branch.local), TOTAL: parameters(branch.local)}
    return {name: max(1, round((count - classes) / (width + 1 + classes))) for name, count in counts.items()}


def active(local: LocalLayer) -> int:
    """The parameters that a row meets: of the gate, the shared expert, and K of the others."""
    always = parameters(local.gate) + (parameters(local.shared) if local.shared is not None else 0)
    experts = [parameters(module) for module in local.experts.children()]
    return always + (local.gate.k or 1) * experts[0]


def served_layer(name: str, model: Branch, folder: Path) -> Layer:
    """The declaration of a layer, with its experts as files in the folder."""
    folder.mkdir(exist_ok=True)

    def expert(key: str, module: nn.Module) -> Expert:
        path = folder / f"{key}.safetensors"
        save_module(path, module)
        return declared(model.data, len(module.get_parameter("up_proj.weight")), path)

    local = model.local
    shared = {} if local.shared is None else {"common": expert("common", local.shared)}
    experts = {key: expert(key, module) for key, module in local.experts.named_children()}
    return Layer(name, local.gate.eval(), experts, shared=shared)


def accuracy(answers_TC: Tensor, y_T: Tensor) -> float:
    """The share of rows whose label has the highest score."""
    return float((answers_TC.argmax(dim=1) == y_T).float().mean())


def result(job: Job, client: Client, models: Mapping[str, Branch], told: tuple[str, ...]) -> Result:
    """Predict: measure every model as it is served, and let the layer of the branch taken learn on meanwhile."""
    measured = []
    for name, model in models.items():
        job.tell(f"predicting by {model.title}")
        measured.append(whole(client, name, model))
    taken = next(iter(models))
    measured += [alone(client, taken, key, models[taken]) for key in models[taken].local.names]
    x_TD, y_T = models[taken].data.held_x, models[taken].data.held_y
    job.tell("training while it serves")
    update = update_live(
        request=lambda: client.call(taken, x_TD[:SERVED_AT_ONCE]),
        update=lambda: [learn_on(job, client, taken, models[taken])],
        quality=lambda: accuracy(ServedLayer(client, taken)(x_TD), y_T),
    )
    return Result(models=tuple(measured), update=update, lines=told)


def whole(client: Client, layer: str, branch: Branch) -> Measured:
    """A layer as it is served."""
    x_TD = branch.data.held_x
    return Measured(
        model=f"{branch.title}, as served",
        quality={"accuracy": accuracy(ServedLayer(client, layer)(x_TD), branch.data.held_y)},
        parameters=parameters(branch.local),
        active=active(branch.local),
        flops=flops_of(lambda: branch.local(x_TD), len(x_TD)),
        seconds=branch.seconds,
        rows_per_second=rate_of(lambda: len(client.call(layer, x_TD[:SERVED_AT_ONCE]).output)),
    )


def alone(client: Client, layer: str, key: str, branch: Branch) -> Measured:
    """An expert by itself, with what all share."""
    modules = [branch.local.experts.get_submodule(key)]
    modules += [branch.local.shared] if branch.local.shared is not None else []
    x_TD, count = branch.data.held_x, parameters(*modules)
    answers_TC = ServedLayer(client, layer, top_k=1, allow=[f"{layer}/{key}"])(x_TD)
    return Measured(
        model=f"expert {key} alone",
        quality={"accuracy": accuracy(answers_TC, branch.data.held_y)},
        parameters=count,
        active=count,
        flops=flops_of(lambda: [module(x_TD) for module in modules], len(x_TD)),
    )


def learn_on(job: Job, client: Client, layer: str, branch: Branch) -> SwapOutcome:
    """Train all experts, what they share, and their gate a little further, and publish them in one epoch."""
    data, gate = branch.data, branch.local.gate
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE / 10)
    generator = torch.Generator().manual_seed(job.seed)
    with client.train(layer, optimizer="torch.optim:AdamW", lr=RATE / 10, seed=job.seed) as session:
        moe = RemoteMoE(client, layer, gate=gate, session=session)
        for _ in range(3 if job.small else 50):
            rows_B = torch.randint(len(data.x), (BATCH,), generator=generator)
            loss = F.cross_entropy(moe(F.dropout(data.x[rows_B], DROPOUT)), data.y[rows_B])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step()
        return session.publish(gate=gate)


if __name__ == "__main__":
    main("article", sys.argv[1:])
