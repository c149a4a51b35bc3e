"""`expertmesh sessions`: who trains which experts, and the end of a session that nobody goes on with."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..connect import cluster_options, connect
from ..output import new_console, new_table, output_option, print_json


@click.command()
@click.option("--end", metavar="ID", help="End a session, and forget what it has learned and not published.")
@cluster_options
@output_option
def sessions(end: str | None, name: str | None, endpoint: str | None, ca_cert: Path | None, output: str) -> None:
    """Show the sessions of training of a running cluster: whose they are, their experts, and their durable step.

    An expert has one session at a time. One whose process is gone can be resumed by its ID, or ended.

    \b
    Examples:
      expertmesh sessions
      expertmesh sessions --end 3fa1c2d40b9e4c0e8d7f6a5b4c3d2e1f
    """
    with connect(name, endpoint, ca_cert) as client:
        if end is not None:
            client.end_training(end)
        found = client.training_sessions()
    if output == "json":
        print_json(found)
        return
    rows = [
        (told["id"], told["layer"], ", ".join(id.partition("/")[2] for id in told["experts"]), told["holder"],
         time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["opened_at"])), told["durable"])
        for told in found
    ]  # fmt: skip
    new_console().print(new_table(None, ("session", "layer", "experts", "holder", "opened", "durable step"), rows))
