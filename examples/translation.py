"""Machine translation: an encoder-decoder transformer whose feed-forward blocks are sparse layers of the cluster.

Each block's feed-forward network is a layer of its own: a top-k gate and its experts. They are trained in this process
as `LocalLayer`, with a load-balance loss on each gate; then a `ServedLayer` takes the place of each, while embeddings
and attention stay here. Translations are found by a beam search that sends the newest token of all hypotheses of all
sentences in one call, and keeps the keys and values of the tokens before it.

The default data are dates, numbers, amounts, and names of languages, territories and currencies, as babel writes them
in two languages (`--set source=en --set target=de`): several kinds of text with rules of their own, of which every
machine has plenty. `--data` is a TSV of sentences and their translations. Sizes follow from the number of pairs. A
tenth is held out, and a twentieth arrives later: no model sees it until two experts learn from it while the layers
serve.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from sacrebleu import BLEU, CHRF
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from expertmesh import Client, Cluster, Expert, Layer, RemoteMoE, SwapOutcome, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.examples.data.corpus import Corpus, padded
from expertmesh.examples.data.pairs import GENERATED, Pair, generated_pairs, read_pairs
from expertmesh.examples.models.encoder_decoder import Transformer, beam_search
from expertmesh.examples.models.sparse_layer import SparseLayer
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import save_module
from expertmesh.router.gates import Routing
from expertmesh.router.mixture.local import LocalLayer

OPTIONS = {"source": "en", "target": "de"}
BALANCE = 0.01
SENTENCES = 128
"""How many sentences are translated at once."""
SHOWN = 10
DENSE = "dense"
MODELS = {
    "sparse": "sparse layers, top-{k} of {experts}, as served",
    "active": "dense, equal active parameters, as served",
    "total": "dense, equal parameters, as served",
}
SMALL_PAIRS = 400
BY_CHARACTER = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}
"""How BLEU cuts the text of languages that do not put spaces between words."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models are, and how long they are trained: what a number of pairs is worth."""

    vocabulary: int
    width: int
    held: int
    batch: int
    steps: int
    update_steps: int = 60
    depth: int = 2
    heads: int = 4
    experts: int = 8
    k: int = 2
    hidden: int = 96
    lr: float = 3e-3

    @classmethod
    def of(cls, pairs: int, small: bool) -> Size:
        """The size for so many pairs: more of them are worth more subwords, wider models and longer training."""
        if small:
            return cls(
                vocabulary=300, width=32, held=16, batch=300, steps=12, update_steps=3, depth=1, experts=4, hidden=32
            )
        width = 96 if pairs < 12_000 else 128
        return cls(
            vocabulary=min(4000, max(500, pairs // 8)), held=min(500, pairs // 10), width=width, hidden=width,
            batch=700 if pairs < 12_000 else 1000, steps=800 if pairs < 12_000 else 1000,
        )  # fmt: skip


class Translator:
    """Translates texts with a model, and scores its translations of the held-out pairs."""

    def __init__(self, model: Transformer, corpus: Corpus, language: str) -> None:
        self._model, self._corpus = model, corpus
        self._tokenize = BY_CHARACTER.get(language[:2], "13a")
        self._sources, self._targets = ([pair[side] for pair in corpus.held] for side in (0, 1))

    def translate(self, texts: Sequence[str]) -> list[str]:
        """A translation of each text; those of similar length go together."""
        tokens = self._corpus.subwords.encode(texts)
        order = sorted(range(len(texts)), key=lambda n: len(tokens[n]))
        found: dict[int, str] = {}
        for start in range(0, len(order), SENTENCES):
            part = order[start : start + SENTENCES]
            hypotheses = beam_search(self._model, padded([tokens[n] for n in part]))
            found |= {n: self._corpus.subwords.decode(own) for n, own in zip(part, hypotheses, strict=True)}
        return [found[n] for n in range(len(texts))]

    def quality(self) -> dict[str, float]:
        """BLEU and chrF of the held-out pairs, 0 to 100."""
        found = self.translate(self._sources)
        bleu = BLEU(tokenize=self._tokenize).corpus_score(found, [self._targets])
        return {"BLEU": bleu.score, "chrF": CHRF().corpus_score(found, [self._targets]).score}

    def flops(self) -> float:
        """The operations of the translation of a text; attention is counted as the matrix products that it is."""
        texts = self._sources[:SENTENCES]
        with sdpa_kernel(SDPBackend.MATH):
            return flops_of(lambda: self.translate(texts), len(texts))

    def rate(self) -> float:
        """How many texts are translated in a second."""
        texts = self._sources[:SENTENCES]
        return rate_of(lambda: len(self.translate(texts)))

    def lines(self) -> list[str]:
        """Some translations beside those that were held out."""
        shown = zip(self._sources, self.translate(self._sources[:SHOWN]), self._targets, strict=False)
        return [
            f"{source} → {found}" + ("" if found == target else f"   [{target}]") for source, found, target in shown
        ]


def run(job: Job) -> Result:
    """Train, serve, compare and update one seed."""
    pairs = pairs_of(job)
    size, language = Size.of(len(pairs), job.small), job.options.get("target", OPTIONS["target"])
    corpus = Corpus.of(pairs, held=size.held, vocabulary=size.vocabulary, seed=job.seed)
    models = {name: model_of(size, name, job.seed) for name in MODELS}
    seconds = {name: train(model, corpus, size, job, name) for name, model in models.items()}
    with tempfile.TemporaryDirectory(prefix="expertmesh-translation-") as folder:
        layers = [*sparse_layers(models["sparse"], Path(folder)), dense_layer(models, Path(folder))]
        name = f"translation-{os.getpid()}-{job.seed}"
        cluster = Cluster.start(layers, name=name, port=0, state_dir=Path(folder) / "state", progress=job.tell)
        with cluster, Client(cluster.endpoint, timeout=120.0) as client:
            measured = []
            for name, model in models.items():
                job.tell(f"translating {len(corpus.held):,} held-out texts: {name}")
                served = Translator(with_served(model, client, name), corpus, language)
                measured.append(
                    Measured(
                        model=MODELS[name].format(k=size.k, experts=size.experts), quality=served.quality(),
                        parameters=parameters(model), active=active_parameters(model, size),
                        flops=Translator(model, corpus, language).flops(), seconds=seconds[name],
                        rows_per_second=served.rate(),
                    )
                )  # fmt: skip
            for expert in expert_names(size):
                job.tell(f"translating {len(corpus.held):,} held-out texts: expert {expert} of each layer alone")
                measured.append(measured_alone(models["sparse"], expert, corpus, language))
            sparse = Translator(with_served(models["sparse"], client, "sparse"), corpus, language)
            lines, rows = sparse.lines(), last_rows(models["sparse"], corpus, size)
            update = update_live(
                lambda: client.call(last_layer(size), rows),
                lambda: [learn(client, models["sparse"], corpus, size, job)],
                lambda: sparse.quality()["BLEU"],
            )
    return Result(models=tuple(measured), update=update, lines=tuple(lines))


def measured_alone(model: Transformer, expert: str, corpus: Corpus, language: str) -> Measured:
    """The model in which one expert of each layer answers all rows, with all of a row's weight."""
    alone = copy.deepcopy(model)
    for block in alone.blocks.values():
        layer = cast(SparseLayer, block.feed_forward)
        only = {expert: cast(nn.ModuleDict, layer.experts)[expert]}
        block.feed_forward = LocalLayer(gates.Fixed([float(layer.gate.k or 1)]), only)
    translator, count = Translator(alone, corpus, language), parameters(alone)
    return Measured(
        model=f"expert {expert} of each layer alone", quality=translator.quality(),
        parameters=count, active=count, flops=translator.flops(),
    )  # fmt: skip


def pairs_of(job: Job) -> list[Pair]:
    """The pairs of the user's file, or generated ones."""
    if job.data is not None:
        return read_pairs(job.data)
    languages = {**OPTIONS, **job.options}
    return generated_pairs(languages["source"], languages["target"], SMALL_PAIRS if job.small else GENERATED)


def model_of(size: Size, name: str, seed: int) -> Transformer:
    """An untrained model with sparse layers, or a dense one with as many parameters, "active" or in "total"."""
    torch.manual_seed(seed)
    layer = sparse_layer(size)
    if name == "sparse":
        return transformer(size, lambda: sparse_layer(size))
    whole = parameters(layer) - (idle_parameters(size) if name == "active" else 0)
    hidden = round((whole - size.width) / (2 * size.width + 1))
    return transformer(size, lambda: FeedForward(size.width, hidden))


def sparse_layer(size: Size) -> SparseLayer:
    """A gate and its experts, untrained.

    The weights of a row's k experts sum to k, so that they add up as the parts of one dense network do.
    """
    gate = gates.TopK(size.width, size.experts, k=size.k, scale=size.k)
    return SparseLayer(gate, {name: FeedForward(size.width, size.hidden) for name in expert_names(size)})


def expert_names(size: Size) -> list[str]:
    """The names of the experts of a layer."""
    return [f"e{number}" for number in range(size.experts)]


def idle_parameters(size: Size) -> int:
    """The parameters of a sparse layer that a row does not meet."""
    return (size.experts - size.k) * parameters(FeedForward(size.width, size.hidden))


def active_parameters(model: Transformer, size: Size) -> int:
    """The parameters of a model that a row meets."""
    sparse = sum(isinstance(block.feed_forward, SparseLayer) for block in model.blocks.values())
    return parameters(model) - sparse * idle_parameters(size)


def train(model: Transformer, corpus: Corpus, size: Size, job: Job, name: str) -> float:
    """Train a model on the batches that each model sees; returns seconds."""
    batches = corpus.batches(corpus.train, size.batch, job.seed)
    order = batches.first(size.steps)
    sparse = [module for module in model.modules() if isinstance(module, SparseLayer)]

    def loss_of(step: int) -> Tensor:
        loss = batches.loss(model, order[step])
        return loss + BALANCE * sum((layer.balance_loss for layer in sparse), torch.zeros(()))

    checkpoint = job.folder / f"{name}.safetensors"
    seconds = fit(model, loss_of, steps=size.steps, lr=size.lr, checkpoint=checkpoint, tell=job.tell)
    for layer in sparse:
        layer.balance_loss = torch.zeros(())  # the last one has a graph, and cannot be copied
    return seconds


def transformer(size: Size, feed_forward: Callable[[], nn.Module]) -> Transformer:
    """A model of this size."""
    return Transformer(
        vocabulary=size.vocabulary, width=size.width, heads=size.heads, depth=size.depth, feed_forward=feed_forward
    )


def sparse_layers(model: Transformer, folder: Path) -> list[Layer]:
    """The sparse layers of the model as layers of a cluster; the experts of each share a process."""
    layers = []
    for name, block in model.blocks.items():
        layer = cast(SparseLayer, block.feed_forward)
        experts = cast(nn.ModuleDict, layer.experts).items()
        declared = {own: declared_expert(module, folder / f"{name}-{own}.safetensors", name) for own, module in experts}
        layers.append(Layer(name, layer.gate, declared))
    return layers


def dense_layer(models: Mapping[str, Transformer], folder: Path) -> Layer:
    """The feed-forward networks of the dense models as the experts of one layer: each block asks for its own."""
    experts = {
        f"{model}-{name}": declared_expert(block.feed_forward, folder / f"{model}-{name}.safetensors", DENSE)
        for model in ("active", "total")
        for name, block in models[model].blocks.items()
    }
    return Layer(DENSE, gates.Fixed([1.0] * len(experts)), experts)


def declared_expert(module: nn.Module, weights: Path, pack: str) -> Expert:
    """A trained network as an expert with its weights in a file."""
    save_module(weights, module)
    hidden, width = cast(FeedForward, module).up_proj.weight.shape
    row = TensorSpec((width,), "float32")
    factory = "expertmesh.experts.modules:FeedForward"
    return Expert(factory, args=(width, hidden), weights=weights, input=row, output=row, pack=pack)


def with_served(model: Transformer, client: Client, name: str) -> Transformer:
    """A copy whose feed-forward networks are those that the cluster serves."""
    copied = copy.deepcopy(model)
    for layer, block in copied.blocks.items():
        dense = name != "sparse"
        block.feed_forward = (
            ServedLayer(client, DENSE, allow=[f"{name}-{layer}"]) if dense else ServedLayer(client, layer)
        )
    return copied


def last_layer(size: Size) -> str:
    """The layer that is updated."""
    return f"decoder{size.depth - 1}"


def last_rows(model: Transformer, corpus: Corpus, size: Size) -> Tensor:
    """Some rows that the last layer gets."""
    caught: list[Tensor] = []
    hook = model.blocks[last_layer(size)].feed_forward.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    batches = corpus.batches(corpus.held, size.batch, 0)
    with torch.no_grad():
        batches.loss(model, batches.first(1)[0])
    hook.remove()
    return caught[0][:64]


class PartlyLearning(nn.Module):
    """A layer of which some experts learn in the cluster, while gate and all other experts answer here as they are."""

    def __init__(self, layer: SparseLayer, remote: RemoteMoE, learning: Tensor) -> None:
        super().__init__()
        self.layer, self.remote, self.learning = layer, remote, learning

    def forward(self, x: Tensor) -> Tensor:
        """The answers to the rows `x` [N, D]."""
        routing = self.layer.gate(x)
        indices_NK, weights_NK = routing.indices_TK, routing.weights_TK
        learns_NK = torch.isin(indices_NK, self.learning)
        rest = Routing(indices_NK.masked_fill(learns_NK, -1), weights_NK.masked_fill(learns_NK, 0.0))
        learned = self.remote(
            x, indices=indices_NK.masked_fill(~learns_NK, -1), weights=weights_NK.masked_fill(~learns_NK, 0.0)
        )
        return self.layer.with_routing(x, rest).output + learned  # type: ignore[no-any-return]


def learn(client: Client, model: Transformer, corpus: Corpus, size: Size, job: Job) -> SwapOutcome:
    """Train the two experts of the last layer that get most rows of the late pairs on these and others, and publish."""
    model = copy.deepcopy(model).requires_grad_(False)
    block = model.blocks[last_layer(size)]
    layer = cast(SparseLayer, block.feed_forward)
    late = corpus.batches(corpus.late, size.batch, job.seed)
    late.loss(model, late.first(1)[0])
    learning = layer.load_E.topk(2).indices
    batches = corpus.batches([*corpus.late, *corpus.train[: 3 * len(corpus.late)]], size.batch, job.seed)
    with client.train(
        last_layer(size), lr=size.lr / 8, schedule="cosine", total_steps=size.update_steps, clip_norm=1.0,
        optimizer="torch.optim:AdamW", weight_decay=0.0,
    ) as session:  # fmt: skip
        block.feed_forward = PartlyLearning(layer, RemoteMoE(client, last_layer(size), session=session), learning)
        for step, batch in enumerate(batches.first(size.update_steps)):
            batches.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            session.step()
            job.tell(f"update: step {step + 1}/{size.update_steps}")
        return session.publish(experts=[session.experts[number] for number in learning.tolist()])


if __name__ == "__main__":
    main("translation", sys.argv[1:])
