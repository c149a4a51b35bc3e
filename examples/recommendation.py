"""Recommendation: two tasks, one set of experts, and a gate for each task (multi-gate mixture of experts).

Will a user take an item, and if so, will he like it? Both tasks share the experts, and each has its own gate (Ma et al.
2018), which here chooses two of them. On the cluster this is one layer: its gate has the gates of both tasks side by
side, and reads the row in the place of the task that asks, zeros in the other's (`gate_input`). So the gates have
versions, are swapped with the experts, and need no code of ours where they are served; a routing that the caller makes
(`top_k_index`) would have none of this. Embeddings of users and items stay here, as do the heads of the tasks.

The default data is on any machine, and nobody's: the files of Python's standard library are users, the functions and
methods that they call are items, and the rating is how often. Packages that ship ratings of people either download them
or may not pass them on. `--data` is a CSV file with the columns user, item and rating. Whoever has rated an item has
taken it; who has rated it above the median likes it. A fifth of the interactions is held out, and a tenth is new later.
To each there are pairs that did not happen, with items drawn as often as they are taken, so popularity alone tells
nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import Client, Cluster, Expert, Layer, RemoteMoE, SwapOutcome, TensorSpec, gates
from expertmesh.cluster.applications.cost import flops_of, parameters, rate_of
from expertmesh.cluster.applications.fit import fit
from expertmesh.cluster.applications.live_update import update_live
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.cluster.cli.applications.examples import main
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.examples.data.interactions import Interactions, read_csv, standard_library
from expertmesh.examples.models.sparse_layer import SparseLayer
from expertmesh.experts.modules import FeedForward
from expertmesh.experts.weights.files import save_module

TASKS = ("takes", "likes")
LAYER = "items"
BALANCE = 0.01
SCALE = 0.1
DRAWS = 40
"""How many items that a user has not are drawn for each pair to train on."""
BATCH = 256
SHOWN = 5
NAMES = {
    "sparse": "sparse layer, two gates, top-{size.k} of {size.experts}, as served",
    "active": "dense, equal active parameters, as served",
    "total": "dense, equal parameters, as served",
    "factors": "matrix factorisation, equal parameters",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models are, and how long they are trained."""

    width: int = 16
    experts: int = 8
    k: int = 2
    hidden: int = 32
    outputs: int = 16
    batch: int = 512
    steps: int = 600
    lr: float = 5e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    update_steps: int = 30


SMALL = Size(experts=4, steps=30, update_steps=4)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a user and an item that happened, int64 [N, 2], if he likes it, [N], and items he has not, [N, M]."""

    taken_N2: Tensor
    likes_N: Tensor
    others_NM: Tensor

    def batch(self, size: int, seed: int) -> Pairs:
        """Some of the pairs, each with one other item, drawn with a seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.likes_N), (size,), generator=generator)
        chosen = torch.randint(self.others_NM.shape[1], (size, 1), generator=generator)
        return Pairs(self.taken_N2[drawn], self.likes_N[drawn], self.others_NM[drawn].gather(1, chosen))

    @property
    def both_N2(self) -> Tensor:
        """First the pairs that happened, then as many that did not."""
        return torch.cat([self.taken_N2, torch.stack([self.taken_N2[:, 0], self.others_NM[:, 0]], dim=1)])


class TwoGates(SparseLayer):
    """Experts of both tasks, and a gate of each: rows [T, D] to answers [2, T, O]."""

    def forward(self, x: Tensor, **options: object) -> Tensor:
        """The answers for each task."""
        return by_task(super().forward(torch.cat([x, x]), gate_input=for_gates(x)))


class Remote(nn.Module):
    """The same on the cluster: `ask` answers rows [2T, D] for what the gates read [2T, 2D]."""

    def __init__(self, ask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        """The answers for each task."""
        return by_task(self.ask(torch.cat([x, x]), for_gates(x)))


def by_task(answers: Tensor) -> Tensor:
    """Answers [2T, O] as [2, T, O]."""
    return answers.view(len(TASKS), -1, answers.shape[-1])


def for_gates(x: Tensor) -> Tensor:
    """What the gates read [2T, 2D] of rows [T, D]: each task's gate has a half of the features for itself."""
    zeros = torch.zeros_like(x)
    return torch.cat([torch.cat([x, zeros], dim=1), torch.cat([zeros, x], dim=1)])


class Recommender(nn.Module):
    """Logits [T, 2] of both tasks for pairs [T, 2]; `network` answers [T, O] or, for each task, [2, T, O]."""

    def __init__(self, data: Interactions, size: Size, network: nn.Module) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(names), size.width) for names in (data.users, data.items))
        self.biases = nn.ModuleList(nn.Embedding(len(names), len(TASKS)) for names in (data.users, data.items))
        self.dropout = nn.Dropout(size.dropout)
        self.network = network
        self.heads = nn.Parameter(torch.randn(len(TASKS), 1, size.outputs) / size.outputs**0.5)
        begin(self)

    def rows(self, pairs_T2: Tensor) -> Tensor:
        """The rows [T, 3·width] that the network gets: user, item, and their product."""
        user, item = (self.dropout(table(own)) for table, own in zip(self.tables, pairs_T2.T, strict=True))
        return torch.cat([user, item, user * item], dim=1)

    def forward(self, pairs_T2: Tensor) -> Tensor:
        """The logits."""
        answers = self.dropout(self.network(self.rows(pairs_T2)))
        logits: Tensor = (answers * self.heads).sum(dim=-1).T + bias_of(self, pairs_T2)
        return logits


class Factors(nn.Module):
    """Matrix factorisation: the product of a user's factors with an item's, which each task weighs."""

    def __init__(self, data: Interactions, size: Size, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(names), width) for names in (data.users, data.items))
        self.biases = nn.ModuleList(nn.Embedding(len(names), len(TASKS)) for names in (data.users, data.items))
        self.dropout = nn.Dropout(size.dropout)
        self.heads = nn.Parameter(torch.ones(len(TASKS), width))
        begin(self)

    def forward(self, pairs_T2: Tensor) -> Tensor:
        """The logits [T, 2]."""
        user, item = (self.dropout(table(own)) for table, own in zip(self.tables, pairs_T2.T, strict=True))
        return F.linear(user * item, self.heads) + bias_of(self, pairs_T2)


def begin(model: Recommender | Factors) -> None:
    """Draw small factors, and no bias."""
    for table, bias in zip(model.tables, model.biases, strict=True):
        nn.init.normal_(cast(Tensor, table.weight), std=SCALE)
        nn.init.zeros_(cast(Tensor, bias.weight))


def bias_of(model: Recommender | Factors, pairs_T2: Tensor) -> Tensor:
    """How much is taken and liked by a user, and of an item, [T, 2]."""
    users, items = (bias(own) for bias, own in zip(model.biases, pairs_T2.T, strict=True))
    return cast(Tensor, users + items)


def run(job: Job) -> Result:
    """Train, serve, compare and update one seed."""
    size = SMALL if job.small else Size()
    data = standard_library() if job.data is None else read_csv(job.data)
    known, new, held = split(data, job.seed)
    models = {kind: model_of(data, size, kind, job.seed) for kind in NAMES}
    seconds = {kind: train(model, known, size, job, kind) for kind, model in models.items()}
    sparse = cast(Recommender, models["sparse"])
    layer = cast(SparseLayer, sparse.network)
    costs = {kind: cost_of(model, size, held) for kind, model in models.items()}
    alone = []
    for name in layer.names:
        sparse.network = layer.expert(name)
        alone.append(
            Measured(model=f"expert {name} alone", quality=quality(sparse, held), **cost_of(sparse, size, held))
        )
    with tempfile.TemporaryDirectory(prefix="expertmesh-recommendation-") as temporary:
        folder = Path(temporary)
        experts = {name: served(layer.expert(name), folder / f"{name}.safetensors") for name in layer.names}
        layers = [Layer(LAYER, layer.gate, experts)]
        for kind in ("active", "total"):
            expert = served(cast(FeedForward, models[kind].network), folder / f"{kind}.safetensors")
            layers.append(Layer(kind, gates.Fixed([1.0]), {"dense": expert}))
        cluster = Cluster.start(layers, port=0, state_dir=folder / "state", progress=job.tell)
        with cluster, Client(cluster.endpoint) as client:
            sparse.network = Remote(lambda x, read: client.call(LAYER, x.detach(), gate_input=read.detach()).output)
            for kind in ("active", "total"):
                cast(Recommender, models[kind]).network = ServedLayer(client, kind)
            job.tell("measuring what serves")
            table = []
            for kind, model in models.items():
                rate = None if kind == "factors" else rate_of(partial(asked, model, held))
                name, found = NAMES[kind].format(size=size), quality(model, held)
                own = {"quality": found, "seconds": seconds[kind], "rows_per_second": rate, **costs[kind]}
                table.append(Measured(model=name, **own))
            x = sparse.rows(held.both_N2[:64]).detach()
            done = update_live(
                lambda: client.call(LAYER, torch.cat([x, x]), gate_input=for_gates(x)),
                lambda: [update(client, sparse, layer.gate, new, size, job)],
                lambda: quality(sparse, held)[f"AUC of {TASKS[0]}"],
            )
            lines = advice(sparse, data, int(held.taken_N2[0, 0]))
    return Result(models=(*table, *alone), update=done, lines=lines)


def split(data: Interactions, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """Pairs to train on, those that are new later, and those held out: 7, 1 and 2 tenths, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.users_N)
    order_N = torch.randperm(count, generator=generator)
    first, second = count * 7 // 10, count * 8 // 10
    train = pairs_of(data, order_N[:first], order_N[:first], DRAWS, generator)
    new = pairs_of(data, order_N[first:second], order_N[:second], DRAWS, generator)
    return train, new, pairs_of(data, order_N[second:], order_N, 1, generator)


def pairs_of(data: Interactions, own: Tensor, known: Tensor, draws: int, generator: torch.Generator) -> Pairs:
    """Some of the pairs, with items that are not among the `known` ones of a user: what is held out tells nothing."""
    took_UI = torch.zeros(len(data.users), len(data.items), dtype=torch.bool)
    took_UI[data.users_N[known], data.items_N[known]] = True
    popularity_I = data.items_N[known].bincount(minlength=len(data.items)).double()
    users_N = data.users_N[own]
    others_NM = torch.empty((len(own), draws), dtype=torch.int64)
    for user in sorted(set(users_N.tolist())):
        weights_I = popularity_I * ~took_UI[user]
        weights_I = weights_I if weights_I.any() else popularity_I  # he has taken everything
        rows = (users_N == user).nonzero().flatten()
        drawn = weights_I.multinomial(len(rows) * draws, replacement=True, generator=generator)
        others_NM[rows] = drawn.view(len(rows), draws)
    return Pairs(torch.stack([users_N, data.items_N[own]], dim=1), data.high_N[own], others_NM)


def model_of(data: Interactions, size: Size, kind: str, seed: int) -> Recommender | Factors:
    """The sparse model, a dense one with as many parameters (active or in total), or a factorisation with as many."""
    torch.manual_seed(seed)
    width = 3 * size.width
    experts = {
        f"e{number}": FeedForward(width, size.hidden, out_features=size.outputs) for number in range(size.experts)
    }
    layer = TwoGates(gates.TopK(2 * width, size.experts, k=size.k), experts)
    sparse = Recommender(data, size, layer)
    if kind == "sparse":
        return sparse
    names = len(data.users) + len(data.items)
    if kind == "factors":
        return Factors(data, size, round((parameters(sparse) - names * len(TASKS)) / (names + len(TASKS))))
    share = size.k if kind == "active" else size.experts
    wanted = parameters(layer.gate) + parameters(experts["e0"]) * share
    hidden = round((wanted - size.outputs) / (width + 1 + size.outputs))
    return Recommender(data, size, FeedForward(width, hidden, out_features=size.outputs))


def train(model: Recommender | Factors, pairs: Pairs, size: Size, job: Job, kind: str) -> float:
    """Train a model on batches that are the same for each model; returns seconds."""

    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]

    def loss_of(step: int) -> Tensor:
        loss = loss_on(model, pairs.batch(size.batch, job.seed * 1_000_003 + step))
        return loss + BALANCE * sum((layer.balance_loss for layer in layers), torch.zeros(()))

    return fit(
        model, loss_of, steps=size.steps, lr=size.lr, weight_decay=size.weight_decay,
        checkpoint=job.folder / f"{kind}.safetensors", tell=job.tell,
    )  # fmt: skip


def loss_on(model: nn.Module, batch: Pairs) -> Tensor:
    """The loss of both tasks; only what was taken is liked or not."""
    logits = model(batch.both_N2)
    taken, count = torch.zeros(len(logits)), len(batch.likes_N)
    taken[:count] = 1
    takes = F.binary_cross_entropy_with_logits(logits[:, 0], taken)
    return takes + F.binary_cross_entropy_with_logits(logits[:count, 1], batch.likes_N)


@torch.no_grad()
def quality(model: nn.Module, held: Pairs) -> dict[str, float]:
    """The AUC of each task: how often a pair with the label scores above one without it."""
    logits, count = model(held.both_N2), len(held.likes_N)
    likes, dislikes = logits[:count, 1][held.likes_N > 0], logits[:count, 1][held.likes_N == 0]
    found = auc(logits[:count, 0], logits[count:, 0]), auc(likes, dislikes)
    return {f"AUC of {task}": value for task, value in zip(TASKS, found, strict=True)}


def auc(yes_N: Tensor, no_M: Tensor) -> float:
    """How often a score of the first is above one of the second; half of the ties count."""
    if not len(yes_N) or not len(no_M):
        return 0.5
    ordered_M, yes_N = no_M.sort().values, yes_N.contiguous()
    below = torch.searchsorted(ordered_M, yes_N) + torch.searchsorted(ordered_M, yes_N, right=True)
    return float(below.double().mean()) / 2 / len(no_M)


@torch.no_grad()
def asked(model: nn.Module, held: Pairs) -> int:
    """Ask about some pairs; returns how many."""
    pairs_T2 = held.both_N2[:BATCH]
    model(pairs_T2)
    return len(pairs_T2)


def cost_of(model: nn.Module, size: Size, held: Pairs) -> dict[str, Any]:
    """Parameters, active ones, and operations of a pair, about which both tasks ask."""
    experts = [module for module in model.modules() if isinstance(module, SparseLayer)]
    idle = sum(parameters(layer.experts) * (size.experts - size.k) // size.experts for layer in experts)
    flops = flops_of(lambda: model(held.taken_N2), len(held.taken_N2))
    return {"parameters": parameters(model), "active": parameters(model) - idle, "flops": flops}


def served(module: FeedForward, weights: Path) -> Expert:
    """A trained network as an expert, with its weights in a file; those of a layer share a process."""
    save_module(weights, module)
    hidden, width = module.up_proj.weight.shape
    outputs = len(module.down_proj.weight)
    return Expert(
        "expertmesh.experts.modules:FeedForward", args=(width, hidden), kwargs={"out_features": outputs},
        weights=weights, input=TensorSpec((width,), "float32"), output=TensorSpec((outputs,), "float32"), pack="all",
    )  # fmt: skip


def update(client: Client, model: Recommender, gate: gates.Gate, new: Pairs, size: Size, job: Job) -> SwapOutcome:
    """Train the experts on new pairs, where they are, and publish them."""
    steps, before = size.update_steps, model.network
    with client.train(LAYER, lr=size.lr / 5, schedule="cosine", total_steps=steps, weight_decay=0.0) as session:
        moe = RemoteMoE(client, LAYER, gate=gate, session=session)
        model.network = Remote(lambda x, read: moe(x, gate_input=read))
        for step in range(steps):
            job.tell(f"updating {LAYER}: step {step + 1}/{steps}")
            torch.autograd.backward(loss_on(model, new.batch(size.batch, job.seed * 1_000_003 + step)))
            session.step()
        model.network = before
        return session.publish()


@torch.no_grad()
def advice(model: nn.Module, data: Interactions, user: int) -> tuple[str, ...]:
    """What a user has not taken and is most likely to."""
    items_N = torch.arange(len(data.items))
    logits_N = model(torch.stack([torch.full_like(items_N, user), items_N], dim=1))[:, 0]
    logits_N[data.items_N[data.users_N == user]] = -torch.inf
    best = ", ".join(data.items[item] for item in logits_N.topk(SHOWN).indices.tolist())
    return (f"{data.users[user]} has not taken these, and is most likely to: {best}",)


if __name__ == "__main__":
    main("recommendation", sys.argv[1:])
