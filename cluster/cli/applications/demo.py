"""`expertmesh demo`: training, serving and swapping experts on real text."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from ...demo.run import run_demo
from ..output import new_console


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="CSV file with a column `label`; its other columns are the text."
)
@click.option("--rows", type=click.IntRange(min=100), show_default="all", help="Use at most this many rows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split and the training.")
def demo(data: Path | None, rows: int | None, seed: int) -> None:
    """Train experts on text, serve them as one sparse layer, and swap experts under traffic.

    Without --data the text is the docstrings of Python's standard library, labelled by package. On two cores the demo
    takes one to two minutes. Exits with 1 if a swap or a request goes wrong.

    \b
    Examples:
      expertmesh demo
      expertmesh demo --data news.csv --rows 5000
    """
    torch.set_num_threads(1)  # the matrices are small: a second thread slows them down
    report = run_demo(data, console=new_console(), rows_limit=rows, seed=seed)
    if not report.ok:
        raise SystemExit(1)
