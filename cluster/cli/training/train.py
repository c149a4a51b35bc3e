"""`expertmesh train`: trains a layer in this process, or in a running cluster, and publishes what it learned."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ....experts.errors import InvalidRequest, NotFound
from ...client.client import Client
from ...machine.folder_lock import alone_in
from ...training import record
from ...training.settings import read_train_file
from ...training.trainer import Trainer
from ..connect import cluster_options, connect
from ..output import new_console, output_option, print_json

SECONDS_BETWEEN_LINES = 5.0


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--in-cluster", is_flag=True, help="Train the candidates of a running cluster, where its experts live.")
@click.option("--publish", is_flag=True, help="Swap the result in for what the running cluster serves.")
@click.option("--fresh", is_flag=True, help="Begin anew, and do not go on from the checkpoint in `out`.")
@cluster_options
@output_option
def train(
    config: Path,
    in_cluster: bool,
    publish: bool,
    fresh: bool,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Train the experts and the gate of a layer as the YAML file CONFIG says: in phases, on rows of a file.

    Ctrl-C stops it, and the same command goes on from the last checkpoint. The result is written as files with a
    mesh.yaml for `expertmesh serve`, or with --publish swapped in for what a running cluster serves, in one epoch.

    \b
    CONFIG, with paths relative to it:
      mesh: mesh.yaml                  # declares the layer, as for `expertmesh serve`
      data: rows.csv                   # a header, numbers, and the label in the last column; or a .safetensors
      out: trained                     # checkpoints, train.csv, and the result
      phases:                          # by default these three
        - {kind: experts, epochs: 10}  # each expert on its own rows (subsets: cluster, label, random or all)
        - {kind: gate, epochs: 10}
        - {kind: joint, epochs: 10, lr: 3e-4}

    \b
    Examples:
      expertmesh train train.yaml
      expertmesh train train.yaml --publish
      expertmesh train train.yaml --in-cluster --publish
    """
    read = read_train_file(config)
    options: dict[str, Any] = read.settings.trainer_options() | {"folder": read.out}
    with ExitStack() as stack:
        stack.enter_context(alone_in(read.out))
        for left in read.out.glob(".checkpoint.safetensors.*"):  # of a process that was killed as it wrote
            left.unlink()
        client = stack.enter_context(connect(name, endpoint, ca_cert)) if in_cluster or publish else None
        if fresh and read.out.is_dir():
            _forget(read.out, client if in_cluster else None)
        if in_cluster:
            trainer = Trainer(read.layer.name, read.data, connection=client, gate=read.layer.gate, **options)
        else:
            trainer = Trainer(read.layer, read.data, **options)
        console = new_console() if output == "table" else Console(file=sys.stderr)
        with _shown(console) as tell:
            report = trainer.fit(tell)
        files = {} if in_cluster else trainer.write(read.out)
        outcome = trainer.publish(client) if publish else None
    if output == "json":
        published = None if outcome is None else {"epoch": outcome.epoch, "versions": outcome.after}
        print_json(report.as_dict() | {"classes": read.data.names, "files": files, "published": published})
        return
    if read.data.names:
        click.echo(f"classes, in the order of the outputs: {', '.join(read.data.names)}")
    click.echo(report.table())
    click.echo(f"held-out {report.figure}: {report.before:.4f} before, {report.after:.4f} after")
    if files:
        click.echo(f"written: {read.out / 'mesh.yaml'} (`expertmesh serve {read.out / 'mesh.yaml'}` serves it)")
    if outcome is not None:
        click.echo(f"published as epoch {outcome.epoch}: {', '.join(outcome.after.values())}")
    elif in_cluster:
        click.echo("not published: the same command with --publish does it")
        click.echo(f"`expertmesh sessions --end {trainer.session.id}` forgets it")


def _forget(out: Path, client: Client | None) -> None:
    """Remove what a training goes on from, and end its session."""
    session = out / "session"
    if client is not None and session.is_file():
        with suppress(NotFound, InvalidRequest):
            client.end_training(session.read_text(encoding="utf-8").strip())
    for name in ("checkpoint.safetensors", "session", "train.csv"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)


@contextmanager
def _shown(console: Console) -> Iterator[record.Tell]:
    """A progress bar on a terminal; elsewhere a line every few seconds."""
    if not console.is_terminal:
        last = [time.monotonic()]

        def line(progress: record.Progress) -> None:
            if time.monotonic() - last[0] > SECONDS_BETWEEN_LINES or progress.step == progress.steps:
                last[0] = time.monotonic()
                console.print(str(progress), soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(progress: record.Progress) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.steps, figures="")
            figures = f"loss {progress.loss:.4f}, {progress.rows_per_second:,.0f} rows/s"
            bar.update(tasks[progress.phase], completed=progress.step, figures=figures)

        yield tell
