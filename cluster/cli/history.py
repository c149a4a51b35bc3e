"""`expertmesh history`: lists the stored versions of an expert or gate."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from .connect import cluster_options, connect
from .output import new_console, new_table, output_option, print_json

_COLUMNS = ("version", "", "created (UTC)", "bytes", "epochs", "parent", "origin")


@click.command()
@click.argument("id")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for a reply.")
@cluster_options
@output_option
def history(id: str, timeout: float, name: str | None, endpoint: str | None, ca_cert: Path | None, output: str) -> None:
    """List the stored versions of an expert or gate, oldest first, with the epochs that use them.

    `expertmesh rollback` can restore any of them. `retain_epochs` in the cluster's configuration (default 2) sets how
    many epochs before the current one are kept; older versions are deleted.

    \b
    Examples:
      expertmesh history news/e3
      expertmesh history news/gate -o json | jq '.[-1].version'
    """
    with connect(name, endpoint, ca_cert, timeout) as client:
        versions = client.history(id)
    if output == "json":
        print_json(versions)
    else:
        new_console().print(new_table(None, _COLUMNS, map(_row, versions)))


def _row(version: Mapping[str, Any]) -> tuple[object, ...]:
    created = datetime.fromtimestamp(float(version.get("created") or 0), timezone.utc)
    return (
        version.get("version"),
        "serves" if version.get("current") else "",
        f"{created:%Y-%m-%d %H:%M:%S}",
        version.get("nbytes"),
        ", ".join(map(str, version.get("epochs") or [])) or None,
        version.get("parent"),
        f"{version.get('note')}{' (ephemeral)' if version.get('ephemeral') else ''}",
    )
