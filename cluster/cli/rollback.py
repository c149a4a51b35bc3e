"""`expertmesh rollback`: brings earlier versions back."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import click

from .connect import cluster_options, connect
from .outcome import SwapView, print_outcome, told
from .output import output_option


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--to", help="The version to bring back; by default the one before the current, in `history`.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for loading and verifying.")
@click.option("--dry-run", is_flag=True, help="Load and verify everywhere, commit nothing.")
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
    """Bring the previous version of experts and gates back, all at once, under traffic.

    It is a swap like any other: loaded and verified everywhere before it is committed. How many versions are kept
    follows from `retain_epochs` in the cluster's configuration.

    \b
    expertmesh history news/e3
    expertmesh rollback news/e3
    expertmesh rollback news/e3 --to v7-3fa1c2d40b9e
    expertmesh rollback news/e3 news/gate
    """
    if to is not None and len(ids) > 1:
        raise click.UsageError("--to names the version of one id: roll several back without it, or one after the other")
    swap_id = uuid.uuid4().hex
    started = time.monotonic()
    with (
        connect(name, endpoint, ca_cert) as client,
        SwapView(client, swap_id, quiet=output == "json"),
    ):
        outcome = client.rollback(*ids, to=to, timeout=timeout, dry_run=dry_run, swap_id=swap_id)
    print_outcome(outcome, output, told(outcome, "rolled back", time.monotonic() - started))
