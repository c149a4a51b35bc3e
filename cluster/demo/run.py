"""The demo: trains experts on real text, serves them as one sparse layer, and swaps experts under traffic."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ...experts.spec import Expert, TensorSpec
from ...experts.weights.files import save_module
from ...router.mixture.layer import Layer
from ..client.client import Client
from ..owner.cluster import Cluster
from .features import Dataset, encode, split
from .swaps import SwapReport, swap_under_traffic
from .text import Corpus, read_csv, standard_library
from .training import HIDDEN, NUM_EXPERTS, TOP_K, Trained, accuracy, parameters, train

LAYER = "text"
REPLACED = "e3"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """All figures of a run: held-out accuracies, rows per second through the client, and the swaps under traffic."""

    rows: int
    classes: int
    sparse: float
    mixture: float
    dense: float
    alone: tuple[float, ...]
    rows_per_second: float
    swaps: SwapReport

    @property
    def ok(self) -> bool:
        """Whether the swaps had the expected outcome, and no answer failed, was wrong or mixed."""
        return self.swaps.ok


def run_demo(data: Path | None = None, *, console: Console, rows_limit: int | None = None, seed: int = 0) -> DemoReport:
    """Run the demo on a CSV file or, by default, on the docstrings of the standard library; prints its results.

    Raises ConfigError for a CSV file that cannot be used, and the errors of `Cluster.start`.
    """
    with console.status("reading text") as status:

        def progress(message: str) -> None:
            status.update(Text(message))
            if not console.is_terminal:
                _print_line(console, message)

        corpus = standard_library() if data is None else read_csv(data)
        dataset = encode(corpus, split(corpus, seed=seed, rows_limit=rows_limit), seed=seed)
        _print_corpus(console, corpus, dataset)
        trained = train(dataset, seed=seed, progress=progress)
        with tempfile.TemporaryDirectory(prefix="expertmesh-demo-") as folder:
            layer = _layer(trained, dataset, Path(folder))
            name = f"demo-{os.getpid()}"
            state = Path(folder) / "state"
            cluster = Cluster.start([layer], name=name, port=0, state_dir=state, progress=progress)
            with cluster, Client(cluster.endpoint) as client:
                progress("sending the held-out rows")
                return _evaluate(console, client, trained, dataset, Path(folder), progress)


def _layer(trained: Trained, dataset: Dataset, folder: Path) -> Layer:
    experts = {}
    for number, expert in enumerate(trained.experts):
        path = folder / f"e{number}.safetensors"
        save_module(path, expert)
        experts[f"e{number}"] = _expert(dataset, path, replicas=2 if f"e{number}" == REPLACED else 1)
    return Layer(LAYER, trained.gate, experts)


def _expert(dataset: Dataset, weights: Path, replicas: int = 1) -> Expert:
    classes = len(dataset.names)
    return Expert(
        "expertmesh.experts.modules:FeedForward",
        args=(dataset.width, HIDDEN),
        kwargs={"out_features": classes},
        weights=weights,
        replicas=replicas,
        input=TensorSpec((dataset.width,), "float32"),
        output=TensorSpec((classes,), "float32"),
    )


def _print_line(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _evaluate(
    console: Console,
    client: Client,
    trained: Trained,
    dataset: Dataset,
    folder: Path,
    progress: Callable[[str], None],
) -> DemoReport:
    started = time.perf_counter()
    sparse_TC = _forward(client, dataset.held_x_TD)
    seconds = time.perf_counter() - started
    full_TC = _forward(client, dataset.held_x_TD, top_k=NUM_EXPERTS)
    labels = dataset.held_y_T
    with torch.inference_mode():
        dense = accuracy(trained.dense(dataset.held_x_TD), labels)
        alone = tuple(accuracy(expert(dataset.held_x_TD), labels) for expert in trained.experts)
    _print_accuracies(console, dataset, trained, accuracy(sparse_TC, labels), accuracy(full_TC, labels), dense, alone)
    _print_line(console, f"{len(labels) / seconds:,.0f} held-out rows/s through the client, {BATCH} rows per request\n")
    _print_replicas(console, client.status())
    _print_first_replies(console, client, dataset)
    swaps = swap_under_traffic(client, LAYER, trained, dataset, folder, progress)
    _print_swaps(console, swaps)
    return DemoReport(
        rows=len(dataset.train_y_T) + len(labels),
        classes=len(dataset.names),
        sparse=accuracy(sparse_TC, labels),
        mixture=accuracy(full_TC, labels),
        dense=dense,
        alone=alone,
        rows_per_second=len(labels) / seconds,
        swaps=swaps,
    )


def _forward(client: Client, x_TD: Tensor, **options: Any) -> Tensor:
    return torch.cat([client.forward(LAYER, rows, **options) for rows in torch.split(x_TD, BATCH)])


def _print_corpus(console: Console, corpus: Corpus, dataset: Dataset) -> None:
    _print_line(
        console,
        f"{len(corpus):,} texts in {len(corpus.names)} classes from {corpus.source}: "
        f"{len(dataset.train_y_T):,} for training, {len(dataset.held_y_T):,} held out; "
        f"{dataset.vocabulary:,} words and word pairs, encoded as {dataset.width} features\n",
    )


def _print_accuracies(
    console: Console,
    dataset: Dataset,
    trained: Trained,
    sparse: float,
    full: float,
    dense: float,
    alone: tuple[float, ...],
) -> None:
    table = Table("model", "held-out accuracy", "training rows", "labels seen", "parameters")
    rows = str(len(dataset.train_y_T))
    sparse_size, dense_size = f"{trained.sparse_parameters:,}", f"{parameters(trained.dense):,}"
    table.add_row(f"sparse layer, top-{TOP_K}, as served", f"{sparse:.4f}", rows, "", sparse_size)
    table.add_row("dense mixture, all experts, as served", f"{full:.4f}", rows, "", sparse_size)
    table.add_row("one dense model", f"{dense:.4f}", rows, "", dense_size)
    for number, (expert, score) in enumerate(zip(trained.experts, alone, strict=True)):
        seen = dataset.train_y_T[trained.seen_TE[:, number]]
        counts = torch.bincount(seen, minlength=len(dataset.names)).tolist()
        labels = ", ".join(f"{name} {count}" for name, count in zip(dataset.names, counts, strict=True))
        table.add_row(f"expert e{number} alone", f"{score:.4f}", str(len(seen)), labels, f"{parameters(expert):,}")
    console.print(table)


def _print_replicas(console: Console, status: dict[str, Any]) -> None:
    table = Table("expert", "version", "replica", "node", "pid", "device", "state")
    for expert_id, expert in status["layers"][LAYER]["experts"].items():
        for replica in expert["replicas"]:
            cells = [str(replica[key]) for key in ("id", "node", "pid", "device", "state")]
            table.add_row(expert_id, expert["version"], *cells)
    console.print(table)


def _print_first_replies(console: Console, client: Client, dataset: Dataset) -> None:
    for row, label in zip(dataset.held_x_TD[:3], dataset.held_y_T[:3].tolist(), strict=True):
        reply = client.call(LAYER, row[None])
        predicted = dataset.names[int(reply.output.argmax())]
        versions = ", ".join(f"{name} {version}" for name, version in reply.versions.items())
        _print_line(console, f"held-out text: label {dataset.names[label]}, predicted {predicted}, by {versions}")
    console.print()


def _print_swaps(console: Console, swaps: SwapReport) -> None:
    table = Table("under traffic", "epoch", "versions before", "versions after")
    for step in swaps.steps:
        if step.outcome is None:
            table.add_row(step.title, "unchanged", "", f"refused, {step.refusal}")
        else:
            before, after = (
                "\n".join(map(" ".join, sorted(versions.items())))
                for versions in (step.outcome.before, step.outcome.after)
            )
            table.add_row(step.title, str(step.outcome.epoch), before, after)
    console.print(table)
    traffic = swaps.traffic
    latency = ", ".join(f"p99 {phase} {value:.1f} ms" for phase, value in traffic.p99.items())
    _print_line(
        console,
        f"requests sent {traffic.sent}, failed = {traffic.failed}, wrong = {traffic.wrong}, mixed = {traffic.mixed} "
        f"(every answer was recomputed from the versions that it names); {latency}",
    )
