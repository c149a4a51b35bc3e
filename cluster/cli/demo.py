"""`expertmesh demo`: the main job on real text."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from ..demo.run import run_demo
from .output import new_console


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="CSV with a column `label` and columns of text.")
@click.option("--rows", type=click.IntRange(min=100), help="Take at most so many rows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of split and training.")
def demo(data: Path | None, rows: int | None, seed: int) -> None:
    """Train experts on text, serve them as one sparse layer, and replace one while requests come in.

    Without --data the text is what every Python carries: the docstrings of its standard library, labelled by package.

    \b
    expertmesh demo
    expertmesh demo --data news.csv
    """
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it gives
    report = run_demo(data, console=new_console(), rows_limit=rows, seed=seed)
    if not report.ok:
        raise SystemExit(1)
