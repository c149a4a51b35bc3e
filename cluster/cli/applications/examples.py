"""`expertmesh examples` and `expertmesh example`: the applications, each with fair comparisons and a live update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import click
import torch
from rich.text import Text

from ....experts.errors import ConfigError
from ....experts.suggestion import suggestion
from ...applications.comparison import Comparison, compare
from ...applications.plots import plot_comparison
from ...applications.result import Job
from ..main import cli
from ..output import new_console, new_table, output_option, print_json

NAMES = (
    "text_classification", "translation", "generation", "images", "recommendation", "modalities", "article",
)  # fmt: skip
PACKAGE = "expertmesh.examples"
MOST_SHOWN = 4
"""How many new versions are named in a line."""


@click.command()
@output_option
def examples(output: str) -> None:
    """List the applications that `expertmesh example NAME` runs."""
    about = {name: _first_line(_module(name)) for name in NAMES}
    if output == "json":
        print_json(about)
        return
    new_console().print(new_table(None, ("example", "what it shows"), list(about.items())))


@click.command()
@click.argument("name")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Your own data in place of the default.")
@click.option("--seed", "seed", type=int, help="Run this seed alone.")
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True, help="Run so many seeds.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of results.  [default: NAME-run]")
@click.option("--small", is_flag=True, help="A run of seconds, which shows that it works, not how well.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the example's own.")
@output_option
def example(
    name: str,
    data: Path | None,
    seed: int | None,
    seeds: int,
    out: Path | None,
    small: bool,
    settings: tuple[str, ...],
    output: str,
) -> None:
    """Train an application's sparse layer, compare it with dense models, serve it, and update it under traffic.

    Ctrl-C stops it, and the same command goes on. Results, checkpoints and pictures are in the folder --out. Exits with
    1 if the live update was not published, or a request failed meanwhile.

    \b
    Examples:
      expertmesh examples
      expertmesh example images
      expertmesh example text_classification --data news.csv --seed 1
      expertmesh example translation --set target=fr
    """
    module = _module(name)
    options = _options(name, module, settings)
    torch.set_num_threads(1)  # the models are small, and the processes that serve them want the other cores
    console = new_console()
    folder = out or Path(f"{name}-run")
    chosen = range(seeds) if seed is None else [seed]
    with console.status(Text(name)) as status:

        def tell(line: str) -> None:
            status.update(Text(line))
            if not console.is_terminal and output != "json":
                console.print(Text(line), soft_wrap=True)

        job = Job(seed=0, folder=folder, data=data, small=small, options=options, tell=tell)
        comparison = compare(module.run, name, chosen, job)
    picture = folder / f"{name}.png"
    plot_comparison(comparison, picture)
    if output == "json":
        print_json({**comparison.as_dict(), "picture": str(picture)})
    else:
        _print(comparison, folder, picture)
    if not comparison.ok:
        raise SystemExit(1)


def main(name: str, args: Sequence[str]) -> None:
    """Run an example as a script: `python examples/images.py --small`."""
    cli(args=["example", name, *args], prog_name="expertmesh")


def _print(comparison: Comparison, folder: Path, picture: Path) -> None:
    console = new_console()
    console.print(new_table(None, comparison.columns(), comparison.rows()))
    for seed, result in comparison.results.items():
        update = asdict(result.update)
        told = "{requests:,} requests, {failed} failed, {mixed} mixed; quality {before:.4g} before, {after:.4g} after; "
        new = [f"{id} {version}" for id, version in update["versions"].items()]
        names = ", ".join(new[:MOST_SHOWN]) + (f" and {len(new) - MOST_SHOWN} more" if len(new) > MOST_SHOWN else "")
        line = f"seed {seed}: live update under " + told.format(**update) + names
        console.print(Text(line), soft_wrap=True)
    first = next(iter(comparison.results))
    for line in comparison.results[first].lines:
        console.print(Text(line), soft_wrap=True)
    pictures = [str(folder / f"seed-{first}" / own) for own in comparison.results[first].pictures]
    console.print(Text("pictures: " + ", ".join([str(picture), *pictures])), soft_wrap=True)


def _module(name: str) -> ModuleType:
    if name not in NAMES:
        raise ConfigError(f"there is no example {name!r}{suggestion(name, NAMES, 'the examples are')}")
    return import_module(f"{PACKAGE}.{name}")


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]


def _options(name: str, module: ModuleType, settings: Sequence[str]) -> dict[str, str]:
    """The options of an example: its own defaults, and what was set. Raises ConfigError for one that it has not."""
    options: dict[str, str] = dict(getattr(module, "OPTIONS", {}))
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or key not in options:
            known = ", ".join(f"{own}={default}" for own, default in options.items()) or "none"
            raise ConfigError(f"--set {setting}: example {name} has the options {known}")
        options[key] = value
    return options
