"""`expertmesh swap`: replaces the weights of experts and gates under traffic."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import click

from ..rpc.swaps import MODES
from .connect import cluster_options, connect
from .outcome import SwapView, print_outcome, told
from .output import output_option


@click.command()
@click.argument("changes", nargs=-1, required=True, metavar="ID=FILE...")
@click.option("--expect", multiple=True, metavar="ID=VERSION", help="Refuse unless this version serves; repeatable.")
@click.option("--max-drift", type=float, help="Refuse if answers to probe rows move further (relative L2).")
@click.option("--allow-norm", is_flag=True, help="Allow weights of quite another magnitude.")
@click.option("--mode", type=click.Choice(MODES), default="double", show_default=True, help="Where the new ones wait.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for loading and verifying.")
@click.option("--dry-run", is_flag=True, help="Load and verify everywhere, commit nothing.")
@cluster_options
@output_option
def swap(
    changes: tuple[str, ...],
    expect: tuple[str, ...],
    max_drift: float | None,
    allow_norm: bool,
    mode: str,
    timeout: float,
    dry_run: bool,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Replace the weights of experts and gates by safetensors files, all at once or none of them, under traffic.

    Every replica loads and verifies the new version beside the old one; only then is it committed. Requests under way
    end on the version that they began with. A file that does not fit, holds NaN or was cut short is refused, and the
    old version serves on.

    \b
    expertmesh swap news/e3=e3_v2.safetensors
    expertmesh swap news/e3=e3.safetensors news/gate=gate.safetensors --dry-run
    expertmesh swap news/e3=e3.safetensors --expect news/e3=v7-3fa1c2d40b9e --max-drift 0.2
    expertmesh rollback news/e3          undo it
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
            timeout=timeout,
            dry_run=dry_run,
            swap_id=swap_id,
            progress=view.uploaded,
        )
    print_outcome(outcome, output, told(outcome, "swapped", time.monotonic() - started))


def pairs(texts: tuple[str, ...], form: str) -> dict[str, str]:
    """Read "ID=VALUE" texts. Raises UsageError for another form, or an id that stands twice."""
    found: dict[str, str] = {}
    for text in texts:
        id, equals, value = text.partition("=")
        if not equals or not id or not value:
            raise click.UsageError(f"{text!r} must be {form}")
        if id in found:
            raise click.UsageError(f"{id} stands twice")
        found[id] = value
    return found
