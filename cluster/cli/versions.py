"""`expertmesh history` and `expertmesh rollback`: the stored versions of an expert or gate, and the way back to one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from .connect import cluster_options, connect
from .outcome import SwapView, outcome_line, print_outcome
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


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--to", show_default="the one before the current version", help="Version to restore, for a single ID.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to load and verify the versions.")
@click.option("--dry-run", is_flag=True, help="Load and verify on every replica, commit nothing.")
@cluster_options
@output_option
def rollback(
    ids: tuple[str, ...],
    to: str | None,
    timeout: float,
    dry_run: bool,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Restore the previous version of experts and gates under traffic: all of them or none.

    A rollback is a swap: every replica loads and verifies the version before it is committed. `expertmesh history`
    lists the versions that you can restore; `retain_epochs` in the cluster's configuration (default 2) sets how many
    epochs before the current one are kept.

    \b
    Examples:
      expertmesh history news/e3
      expertmesh rollback news/e3
      expertmesh rollback news/e3 --to v7-3fa1c2d40b9e
      expertmesh rollback news/e3 news/gate
    """
    if to is not None and len(ids) > 1:
        raise click.UsageError("--to takes a single ID: roll back several IDs without --to, or one at a time")
    swap_id = uuid.uuid4().hex
    started = time.monotonic()
    with (
        connect(name, endpoint, ca_cert) as client,
        SwapView(client, swap_id, quiet=output == "json"),
    ):
        outcome = client.rollback(*ids, to=to, timeout=timeout, dry_run=dry_run, swap_id=swap_id)
    print_outcome(outcome, output, outcome_line(outcome, "rolled back", time.monotonic() - started))


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
