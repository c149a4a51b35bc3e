"""`expertmesh status`: shows the layers, experts, versions and replicas of a running cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from .connect import cluster_options, connect
from .output import new_console, new_table, output_option, print_json

_COLUMNS = ("expert", "version", "rows", "errors", "replica", "node", "pid", "device", "state")
_ROUTER_COLUMNS = ("router", "endpoint", "node", "pid", "epoch", "rows in flight", "pins by epoch", "leases", "state")
_ROUTER_COUNTERS = {
    "requests": "requests",
    "failed_requests": "failed",
    "retries": "retries",
    "rows_in_flight": "rows in flight",
    "leases": "leases",
}
_ROUTER_BREAKDOWNS = {
    "batches": "batches by layer",
    "messages": "messages by replica",
    "rows_carried": "rows by transport",
    "pins": "pins by epoch",
}


@click.command()
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for a reply.")
@cluster_options
@output_option
def status(timeout: float, name: str | None, endpoint: str | None, ca_cert: Path | None, output: str) -> None:
    """Show layers, experts, versions and replicas of a running cluster.

    The command finds your cluster on this machine and its token. For any other cluster, give --endpoint and set the
    environment variable EXPERTMESH_TOKEN. The JSON output has more fields than the tables.

    \b
    Examples:
      expertmesh status
      expertmesh status -o json | jq .epoch
      EXPERTMESH_TOKEN=... expertmesh status --endpoint mesh.example.org:50051 --ca-cert ca.pem
    """
    with connect(name, endpoint, ca_cert, timeout) as client:
        document = client.status()
    if output == "json":
        print_json(document)
    else:
        _print_tables(document)


def _print_tables(document: Mapping[str, Any]) -> None:
    console = new_console()
    click.echo(f"cluster {document.get('name')}: {document.get('state')}, epoch {document.get('epoch')}")
    for id, versions in (document.get("draining") or {}).items():
        click.echo(f"draining: {id}, requests in flight still use {', '.join(versions)}")
    for id, why in (document.get("broken") or {}).items():
        click.echo(f"broken: {id} cannot be loaded: {why}")
    for id, version in (document.get("not_declared") or {}).items():
        click.echo(f"not declared: {id}; its version {version} is kept, and serves where {id} is declared again")
    for id, scaled in (document.get("autoscale") or {}).items():
        reason = scaled.get("reason")
        click.echo(f"autoscale: {id} is to have {scaled.get('wanted')} replicas{f': {reason}' if reason else ''}")
    for name, layer in (document.get("layers") or {}).items():
        gate = layer.get("gate") or {}
        click.echo(f"\nlayer {name}: gate {gate.get('id')} ({gate.get('kind')}), version {gate.get('version')}")
        console.print(new_table(None, _COLUMNS, _expert_rows(layer)))
        for id, problem in _problems(layer).items():
            click.echo(f"{id}: {problem}")
    click.echo()
    routers = document.get("routers") or {}
    if len(routers) > 1:
        console.print(new_table(None, _ROUTER_COLUMNS, _router_rows(routers)))
        name = (document.get("router") or {}).get("name")
        click.echo(f"\nrows and errors of experts, and what follows, are those of {name}, which was asked")
    for line in (*_router_lines(document.get("router") or {}), *_controller_lines(document.get("controller") or {})):
        click.echo(line)


def _expert_rows(layer: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row for each replica of a layer; the first one also names the expert."""
    for name, expert in layer.get("experts", {}).items():
        version = f"{expert.get('version')}{' (ephemeral)' if expert.get('ephemeral') else ''}"
        first: tuple[object, ...] = (name, version, expert.get("rows"), expert.get("errors"))
        replicas = expert.get("replicas") or [{"state": "down"}]
        for number, replica in enumerate(replicas):
            lead = first if number == 0 else ("", "", "", "")
            pid = replica.get("pid")
            place = (replica.get("id"), replica.get("node"), None if pid is None else str(pid), replica.get("device"))
            yield (*lead, *place, replica.get("state"))


def _problems(layer: Mapping[str, Any]) -> dict[str, str]:
    """Why replicas of a layer are not ready, by replica, where that is known."""
    replicas = [replica for expert in layer.get("experts", {}).values() for replica in expert.get("replicas") or []]
    return {str(replica.get("id")): str(replica["problem"]) for replica in replicas if replica.get("problem")}


def _router_rows(routers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    """A row for each router. Of one that is silent it is what was last heard."""
    for name, router in routers.items():
        pid, pins = router.get("pid"), router.get("pins") or {}
        place = (router.get("endpoint") or None, router.get("node") or None, None if pid is None else str(pid))
        pinned = ", ".join(f"{epoch} ({count:,})" for epoch, count in pins.items()) or None
        counts = (router.get("epoch"), router.get("rows_in_flight"), pinned, router.get("leases"))
        yield (name, *place, *counts, router.get("state"))


def _router_lines(router: Mapping[str, Any]) -> Iterator[str]:
    """The counters since its start of the router that answered; by layer, replica or epoch only where there are any."""
    if not router:
        return
    name = f" {router['name']}" if "name" in router else ""
    counters = [f"{router.get(key, 0):,} {label}" for key, label in _ROUTER_COUNTERS.items()]
    yield f"router{name}: pid {router.get('pid')}, {', '.join(counters)}"
    for key, label in _ROUTER_BREAKDOWNS.items():
        if counts := router.get(key):
            yield f"  {label}: {', '.join(f'{name} ({count:,})' for name, count in counts.items())}"


def _controller_lines(controller: Mapping[str, Any]) -> Iterator[str]:
    if controller:
        seconds = controller.get("heard_seconds_ago")
        heard = "not heard from yet" if seconds is None else f"last heard from {seconds:.2f} s ago"
        problem = controller.get("problem")
        yield f"controller: {controller.get('state')}, {heard}{f': {problem}' if problem else ''}"
