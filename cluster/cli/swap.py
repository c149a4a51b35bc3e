"""`expertmesh swap`: replaces the weights of experts and gates under traffic."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import click

from ..rpc.swaps import MODES
from .connect import cluster_options, connect
from .outcome import SwapView, outcome_line, print_outcome
from .output import output_option


@click.command()
@click.argument("changes", nargs=-1, required=True, metavar="ID=FILE...")
@click.option("--expect", multiple=True, metavar="ID=VERSION", help="Refuse unless ID serves VERSION now; repeatable.")
@click.option(
    "--max-drift",
    type=float,
    show_default="no limit",
    help="Refuse if answers to probe rows change by more than this relative L2 distance.",
)
@click.option("--allow-norm", is_flag=True, help="Accept tensors whose L2 norm changes by more than a factor of 1000.")
@click.option(
    "--allow-unverified", is_flag=True, help="Accept what cannot be tried, because no rows were declared or served."
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="double",
    show_default=True,
    help="Where new weights wait for the commit: on the device beside the old ones (double), or in main memory.",
)
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to load and verify the weights.")
@click.option("--dry-run", is_flag=True, help="Load and verify on every replica, commit nothing.")
@cluster_options
@output_option
def swap(
    changes: tuple[str, ...],
    expect: tuple[str, ...],
    max_drift: float | None,
    allow_norm: bool,
    allow_unverified: bool,
    mode: str,
    timeout: float,
    dry_run: bool,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Replace the weights of experts and gates with safetensors files under traffic: all of them or none.

    ID is an expert or gate in `expertmesh status`. Every replica loads and verifies the new version beside the old
    one before the swap is committed. Requests in flight finish on the version they started with. A file that is
    truncated, contains NaN or does not match the tensors of its ID is refused, and the old version keeps serving.

    \b
    Examples:
      expertmesh swap news/e3=e3_v2.safetensors
      expertmesh swap news/e3=e3.safetensors news/gate=gate.safetensors --dry-run
      expertmesh swap news/e3=e3.safetensors --expect news/e3=v7-3fa1c2d40b9e --max-drift 0.2
      expertmesh rollback news/e3          # undo
    """
    files, expected = pairs(changes, "ID=FILE"), pairs(expect, "ID=VERSION")
    swap_id = uuid.uuid4().hex
    started = time.monotonic()
    with (
        connect(name, endpoint, ca_cert) as client,
        SwapView(client, swap_id, quiet=output == "json") as view,
    ):
        outcome = client.swap(
            files,
            expect=expected,
            mode=mode,
            max_drift=max_drift,
            allow_norm=allow_norm,
            allow_unverified=allow_unverified,
            timeout=timeout,
            dry_run=dry_run,
            swap_id=swap_id,
            progress=view.uploaded,
        )
    print_outcome(outcome, output, outcome_line(outcome, "swapped", time.monotonic() - started))


def pairs(texts: tuple[str, ...], form: str) -> dict[str, str]:
    """Parse "ID=VALUE" texts. Raises UsageError for another form, or an id that appears twice."""
    values: dict[str, str] = {}
    for text in texts:
        id, equals, value = text.partition("=")
        if not equals or not id or not value:
            raise click.UsageError(f"{text!r} must be {form}")
        if id in values:
            raise click.UsageError(f"{id} appears twice")
        values[id] = value
    return values
