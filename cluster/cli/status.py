"""`expertmesh status`: what a running cluster says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from .connect import cluster_options, connect
from .output import new_console, new_table, output_option, print_json, shown

_COLUMNS = ("expert", "version", "rows", "errors", "replica", "node", "pid", "device", "state")


@click.command()
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for the answer.")
@cluster_options
@output_option
def status(timeout: float, name: str | None, endpoint: str | None, ca_cert: Path | None, output: str) -> None:
    """Show layers, experts, versions and replicas of a running cluster.

    A cluster of yours on this machine is found by itself, and so is its token. For another one, put the token into
    the environment variable EXPERTMESH_TOKEN.

    \b
    expertmesh status
    expertmesh status -o json | jq .epoch
    EXPERTMESH_TOKEN=... expertmesh status --endpoint mesh.example.org:50051 --ca-cert ca.pem
    """
    with connect(name, endpoint, ca_cert, timeout) as client:
        found = client.status()
    if output == "json":
        print_json(found)
    else:
        _print_tables(found)


def _print_tables(found: Mapping[str, Any]) -> None:
    console = new_console()
    console.print(f"cluster {found.get('name')}: {found.get('state')}, epoch {found.get('epoch')}")
    for id, versions in (found.get("draining") or {}).items():
        console.print(f"draining: {id}, requests under way still need {', '.join(versions)}")
    for name, layer in found.get("layers", {}).items():
        console.print()
        console.print(f"layer {name}, gate {_pairs(layer.get('gate', {}))}")
        console.print(new_table(None, _COLUMNS, expert_rows(layer)))
    for part in ("router", "controller"):
        if found.get(part):
            console.print()
            console.print(f"{part}: {_pairs(found[part])}")


def expert_rows(layer: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row for every replica of a layer; the expert stands in its first row."""
    for name, expert in layer.get("experts", {}).items():
        version = f"{expert.get('version')}{' (ephemeral)' if expert.get('ephemeral') else ''}"
        first: tuple[object, ...] = (name, version, expert.get("rows"), expert.get("errors"))
        replicas = expert.get("replicas") or [{"state": "down"}]
        for number, replica in enumerate(replicas):
            lead = first if number == 0 else ("", "", "", "")
            pid = replica.get("pid")
            place = (replica.get("id"), replica.get("node"), None if pid is None else str(pid), replica.get("device"))
            yield (*lead, *place, replica.get("state"))


def _pairs(values: object) -> str:
    if isinstance(values, Mapping):
        return ", ".join(f"{key} {_pairs(value)}" for key, value in values.items()) or "none"
    return str(values) if isinstance(values, int) else shown(values)
