"""`expertmesh history`: the versions of an expert or gate that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from .connect import cluster_options, connect
from .output import new_console, new_table, output_option, print_json

_COLUMNS = ("version", "", "made (UTC)", "bytes", "epochs", "after", "by")


@click.command()
@click.argument("id")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for the answer.")
@cluster_options
@output_option
def history(id: str, timeout: float, name: str | None, endpoint: str | None, ca_cert: Path | None, output: str) -> None:
    """List the versions of an expert or gate that are kept, oldest first, and the epochs that name them.

    Each of them can be rolled back to. Older ones were dropped: `retain_epochs` in the cluster's configuration says how
    many epochs before the current one are kept.

    \b
    expertmesh history news/e3
    expertmesh history news/gate -o json | jq '.[-1].version'
    """
    with connect(name, endpoint, ca_cert, timeout) as client:
        found = client.history(id)
    if output == "json":
        print_json(found)
    else:
        new_console().print(new_table(None, _COLUMNS, version_rows(found)))


def version_rows(found: Iterable[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    """A row for every version."""
    for item in found:
        made = datetime.fromtimestamp(float(item.get("created") or 0), timezone.utc)
        note = f"{item.get('note')}{' (ephemeral)' if item.get('ephemeral') else ''}"
        epochs = ", ".join(map(str, item.get("epochs") or [])) or None
        mark = "serves" if item.get("current") else ""
        yield (
            item.get("version"), mark, f"{made:%Y-%m-%d %H:%M:%S}", item.get("nbytes"), epochs, item.get("parent"), note
        )  # fmt: skip
