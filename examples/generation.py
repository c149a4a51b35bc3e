"""Text generation: a byte-level transformer whose feed-forward blocks are sparse layers of the cluster.

Each block's feed-forward network is a layer of its own, with a top-k gate. All are trained in this process, as
`LocalLayer`, with a load-balance loss on each gate; then a `ServedLayer` takes the place of each, and embeddings and
attention stay here. The model reads and writes bytes: any text will do, and bits per byte can be compared with those of
any other model of the same text. The default is what every Python has, its language reference and the docstrings of its
standard library; `--data` is a text file in UTF-8.

The text is cut into parts that follow each other. The last tenth of each part is held out. The tenth before it is new
text, which no model is trained on; the experts of the last block learn from it while they serve.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from expertmesh import Client, Cluster, Expert, Layer, RemoteMoE, SwapOutcome, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.examples.data.prose import documentation, read_text
from expertmesh.examples.models.sparse_layer import SparseLayer
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import save_module

BYTES = 256
PARTS = 20
PART = 32
"""How many windows are asked about at once."""
BITS = "bits per byte"
KINDS = {
    "sparse": "sparse layers, top-{size.k} of {size.experts}, as served",
    "active": "dense, equal active parameters, as served",
    "total": "dense, equal parameters, as served",
}
BALANCE = 0.003
"""The factor of the load-balance loss of each gate."""
NEAR = 4
"""How many bytes a place sees before the first block: its own, and those just before it."""
LONGEST = 1000.0
"""How many places the slowest rotation takes for a radian."""
TEMPERATURE = 0.7
PROMPT = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models are, how long they are trained, and on how many windows of text they are measured."""

    width: int = 128
    blocks: int = 4
    heads: int = 4
    experts: int = 8
    k: int = 2
    hidden: int = 128
    context: int = 128
    batch: int = 8
    steps: int = 500
    lr: float = 3e-3
    update_steps: int = 60
    held: int = 256
    written: int = 160


SMALL = Size(
    width=32, blocks=2, heads=2, experts=4, hidden=32, context=32, steps=30, update_steps=4, held=16, written=16
)  # fmt: skip


class Block(nn.Module):
    """Causal attention with rotated keys and queries, then what `feed_forward` answers to the row of each place."""

    def __init__(self, size: Size, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.project = nn.Linear(size.width, 3 * size.width)
        self.merge = nn.Linear(size.width, size.width)
        self.norm = nn.LayerNorm(size.width)
        self.feed_forward = feed_forward

    def attend(self, x: Tensor) -> Tensor:
        """x [B, S, D] with what its places tell each other."""
        heads = self.project(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        told = F.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        attended: Tensor = x + self.merge(told.transpose(1, 2).flatten(2))
        return attended

    def rows(self, x: Tensor) -> Tensor:
        """The rows [T, D] that the feed-forward network gets for x [B, S, D]."""
        rows: Tensor = self.norm(x).flatten(0, 1)
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """The places [B, S, D] after this block."""
        x = self.attend(x)
        answers: Tensor = self.feed_forward(self.rows(x))
        return x + answers.view_as(x)


class Transformer(nn.Module):
    """Logits [B, S, 256] of the byte after each of the bytes [B, S]; the embedding is the output layer as well.

    A convolution shows each place the bytes just before it, which attention would take long to learn.
    """

    def __init__(self, size: Size, feed_forwards: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, size.width)
        self.near = nn.Conv1d(size.width, size.width, NEAR, groups=size.width)
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(size, own) for own in feed_forwards))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.bytes.weight, std=size.width**-0.5)
        for name, parameter in self.named_parameters():
            if name.endswith(("merge.weight", "down_proj.weight")):  # a block begins as almost nothing
                parameter.data.mul_(0.1)

    def embed(self, bytes_BS: Tensor) -> Tensor:
        """The places [B, S, D] before the first block."""
        x = self.bytes(bytes_BS) * self.bytes.embedding_dim**0.5
        found: Tensor = self.near(F.pad(x.transpose(1, 2), (NEAR - 1, 0))).transpose(1, 2)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """The logits after the last block."""
        return F.linear(self.norm(x), self.bytes.weight)

    def forward(self, bytes_BS: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(bytes_BS)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of features of x [..., S, D] by angles that grow with the place (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * LONGEST ** (-torch.arange(half) / half)
    left, right = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


@dataclass(frozen=True)
class Text:
    """Bytes to train on, those that are new later, and windows [N, S + 1] of those held out."""

    train: Tensor
    new: Tensor
    held_NS: Tensor


def run(job: Job) -> Result:
    """Train, serve, compare and update one seed."""
    size = SMALL if job.small else Size()
    text = cut(documentation() if job.data is None else read_text(job.data, 10 * PARTS * (size.context + 1)), size)
    models = {kind: model_of(size, kind, job.seed) for kind in KINDS}
    seconds = {kind: train(model, text.train, size, job, kind) for kind, model in models.items()}
    costs = {kind: cost_of(model, size, text) for kind, model in models.items()}
    sparse = models["sparse"]
    learned = [module for module in sparse.modules() if isinstance(module, SparseLayer)]
    blocks = [f"block{number}" for number in range(size.blocks)]
    alone = []
    for name in learned[0].names:
        job.tell(f"measuring expert {name} alone")
        put(sparse, [layer.expert(name) for layer in learned])
        alone.append(
            Measured(model=f"expert {name} alone", quality=quality(sparse, text), **cost_of(sparse, size, text))
        )
    with tempfile.TemporaryDirectory(prefix="expertmesh-generation-") as temporary:
        folder = Path(temporary)
        layers = [sparse_layer(name, layer, folder) for name, layer in zip(blocks, learned, strict=True)]
        layers += [dense_layer(kind, blocks, model, folder) for kind, model in models.items() if kind != "sparse"]
        cluster = Cluster.start(layers, port=0, state_dir=folder / "state", progress=job.tell)
        with cluster, Client(cluster.endpoint, timeout=120.0) as client:
            for kind, model in models.items():
                one = kind == "sparse"
                put(
                    model,
                    [ServedLayer(client, name) if one else ServedLayer(client, kind, allow=[name]) for name in blocks],
                )
            job.tell("measuring what serves")
            table = [
                Measured(
                    model=KINDS[kind].format(size=size), quality=quality(model, text), seconds=seconds[kind],
                    rows_per_second=bytes_per_second(model, text), **costs[kind],
                )
                for kind, model in models.items()
            ]  # fmt: skip
            job.tell("writing a sample")
            lines = sample(sparse, text.held_NS[0, :PROMPT], size, job.seed).splitlines()
            rows = sparse.blocks[-1].rows(sparse.embed(text.held_NS[:1, :-1])).detach()
            done = update_live(
                lambda: client.call(blocks[-1], rows),
                lambda: [update(client, sparse, learned[-1].gate, text.new, size, job)],
                lambda: quality(sparse, text)[BITS],
            )
    told = ("", "the held-out text begins so, and goes on as the served layers wrote it:", *lines)
    return Result(models=(*table, *alone), update=done, lines=told, lower_is_better=True)


def model_of(size: Size, kind: str, seed: int) -> Transformer:
    """The sparse model, or a dense one with as many parameters, active ones or in total."""
    torch.manual_seed(seed)
    if kind == "sparse":
        return Transformer(size, [untrained_layer(size) for _ in range(size.blocks)])
    experts = size.k if kind == "active" else size.experts
    wanted = experts * parameters(FeedForward(size.width, size.hidden)) + size.experts * size.width
    hidden = round((wanted - size.width) / (2 * size.width + 1))
    return Transformer(size, [FeedForward(size.width, hidden) for _ in range(size.blocks)])


def untrained_layer(size: Size) -> SparseLayer:
    """A gate and its experts."""
    experts = {f"e{number}": FeedForward(size.width, size.hidden) for number in range(size.experts)}
    return SparseLayer(gates.TopK(size.width, size.experts, k=size.k), experts)


def put(model: Transformer, feed_forwards: Sequence[nn.Module]) -> None:
    """Let other networks take the place of the feed-forward networks of a model's blocks."""
    for block, feed_forward in zip(model.blocks, feed_forwards, strict=True):
        block.feed_forward = feed_forward


def train(model: Transformer, text: Tensor, size: Size, job: Job, kind: str) -> float:
    """Train a model on windows of the text, which are the same for each model; returns seconds."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]

    def loss_of(step: int) -> Tensor:
        loss = loss_on(model, windows(text, size, job.seed * 1_000_003 + step))
        return loss + BALANCE * sum((layer.balance_loss for layer in layers), torch.zeros(()))

    checkpoint = job.folder / f"{kind}.safetensors"
    return fit(model, loss_of, steps=size.steps, lr=size.lr, checkpoint=checkpoint, tell=job.tell)


def windows(text: Tensor, size: Size, seed: int) -> Tensor:
    """Windows [B, S + 1] of the text, drawn with a seed."""
    drawn = torch.randint(len(text) - size.context, (size.batch, 1), generator=torch.Generator().manual_seed(seed))
    return text[drawn + torch.arange(size.context + 1)].long()


def loss_on(model: nn.Module, bytes_BS: Tensor) -> Tensor:
    """The mean loss of each byte but the first, in nats."""
    return F.cross_entropy(model(bytes_BS[:, :-1]).flatten(0, 1), bytes_BS[:, 1:].flatten())


@torch.no_grad()
def quality(model: nn.Module, text: Text) -> dict[str, float]:
    """How many bits a held-out byte costs."""
    nats = [loss_on(model, part) * len(part) for part in torch.split(text.held_NS, PART)]
    return {BITS: float(torch.stack(nats).sum()) / len(text.held_NS) / math.log(2)}


@torch.no_grad()
def bytes_per_second(model: nn.Module, text: Text) -> float:
    """How many bytes are read in a second."""
    part = text.held_NS[:PART, :-1]
    return rate_of(lambda: model(part)[..., 0].numel())


def cost_of(model: nn.Module, size: Size, text: Text) -> dict[str, Any]:
    """Parameters, active ones, and operations of a byte; the products of attention are counted as such."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    idle = sum(parameters(layer.experts) * (size.experts - size.k) // size.experts for layer in layers)
    part = text.held_NS[:2, :-1]
    with sdpa_kernel(SDPBackend.MATH):
        flops = flops_of(lambda: model(part), part.numel())
    return {"parameters": parameters(model), "active": parameters(model) - idle, "flops": flops}


def sparse_layer(name: str, layer: SparseLayer, folder: Path) -> Layer:
    """A layer that has learned, as a layer of the cluster."""
    experts = {own: served(layer.expert(own), folder / f"{name}-{own}.safetensors", name) for own in layer.names}
    return Layer(name, layer.gate, experts)


def dense_layer(name: str, blocks: Sequence[str], model: Transformer, folder: Path) -> Layer:
    """The feed-forward networks of a dense model as experts, of which each block asks for its own."""
    networks = [module for module in model.modules() if isinstance(module, FeedForward)]
    experts = {
        own: served(network, folder / f"{name}-{own}.safetensors", name)
        for own, network in zip(blocks, networks, strict=True)
    }
    return Layer(name, gates.Fixed([1.0] * len(experts)), experts)


def served(module: FeedForward, weights: Path, pack: str) -> Expert:
    """A trained network as an expert, with its weights in a file; those of a pack share a process."""
    save_module(weights, module)
    hidden, width = module.up_proj.weight.shape
    rows = TensorSpec((width,), "float32")
    factory = "expertmesh.experts.modules:FeedForward"
    return Expert(factory, args=(width, hidden), weights=weights, input=rows, output=rows, pack=pack)


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, size: Size, seed: int) -> str:
    """A prompt, and what the model writes after it."""
    generator = torch.Generator().manual_seed(seed)
    written = prompt[None]
    for _ in range(size.written):
        logits = model(written[:, -size.context :])[:, -1] / TEMPERATURE
        drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
        written = torch.cat([written, drawn], dim=1)
    text = bytes(written[0].tolist()).decode("utf-8", errors="replace")
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def update(client: Client, model: Transformer, gate: gates.Gate, text: Tensor, size: Size, job: Job) -> SwapOutcome:
    """Train the experts of the last block on a new text, where they are, and publish them."""
    *before, last = model.blocks
    layer, steps = f"block{len(before)}", size.update_steps
    with client.train(layer, lr=size.lr / 3, schedule="cosine", total_steps=steps, clip_norm=1.0) as session:
        moe = RemoteMoE(client, layer, gate=gate, session=session)
        for step in range(steps):
            job.tell(f"updating {layer}: step {step + 1}/{steps}")
            batch = windows(text, size, job.seed * 1_000_003 + step)
            with torch.no_grad():
                x = model.embed(batch[:, :-1])
                for block in before:
                    x = block(x)
                x = last.attend(x)
            logits = model.logits(x + moe(last.rows(x)).view_as(x))
            torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
            session.step()
        return session.publish()


def cut(text: bytes, size: Size) -> Text:
    """Cut a text into parts, and each of these into what is trained on, what is new later, and what is held out."""
    parts = torch.frombuffer(bytearray(text), dtype=torch.uint8).chunk(PARTS)
    train, new, held = (
        torch.cat([part[start * len(part) // 10 : stop * len(part) // 10] for part in parts])
        for start, stop in ((0, 8), (8, 9), (9, 10))
    )
    width = size.context + 1
    held_NS = held[: len(held) // width * width].view(-1, width).long()
    spread = torch.linspace(0, len(held_NS) - 1, min(size.held, len(held_NS))).long()
    return Text(train, new, held_NS[spread])


if __name__ == "__main__":
    main("generation", sys.argv[1:])
