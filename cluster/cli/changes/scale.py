"""`expertmesh scale`: gives experts other numbers of replicas, under traffic."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..connect import cluster_options, connect
from ..output import new_console, new_table, output_option, print_json
from ..swap import pairs


@click.command()
@click.argument("changes", nargs=-1, required=True, metavar="ID=REPLICAS...")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds to start, fill and drain.")
@cluster_options
@output_option
def scale(
    changes: tuple[str, ...],
    timeout: float,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Give experts or packs other numbers of replicas under traffic: all of them or none.

    ID is an expert in `expertmesh status`, or a pack; an expert of a pack stands for the pack. New replicas are chosen
    once they hold what serves, and replicas are ended once they have answered. The numbers are kept for the next start.

    \b
    Examples:
      expertmesh scale news/e3=4
      expertmesh scale news/e3=1 news/e4=2 -o json
    """
    wanted = {id: _number(id, text) for id, text in pairs(changes, "ID=REPLICAS").items()}
    started = time.monotonic()
    with connect(name, endpoint, ca_cert) as client:
        outcome = client.scale(wanted, timeout=timeout)
    if output == "json":
        print_json(outcome)
        return
    rows = [(id, numbers["before"], numbers["after"]) for id, numbers in outcome.items()]
    new_console().print(new_table(None, ("id", "replicas before", "after"), rows))
    click.echo(f"scaled in {time.monotonic() - started:.1f} s")


def _number(id: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.UsageError(f"{id}={text}: the number of replicas must be a whole number") from None
