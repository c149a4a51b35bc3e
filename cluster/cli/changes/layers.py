"""`expertmesh add` and `expertmesh remove`: experts and layers come and go, under traffic."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ....experts.errors import InvalidRequest, NotFound
from ....experts.names import GATE
from ...config.loader import load_config
from ...owner.wanted import wanted_document
from ...placement.change_plan import SECTIONS, Document, plan_changes
from ..connect import cluster_options, connect
from ..output import new_console, new_table, output_option, print_json
from .carrying_out import Course


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path))
@click.argument("id")
@click.option(
    "--allow-unverified", is_flag=True, help="Accept what cannot be tried, because no rows were declared or served."
)
@cluster_options
@output_option
def add(
    mesh: Path,
    id: str,
    allow_unverified: bool,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Add an expert or a layer to a running cluster as the YAML file MESH declares it, and nothing else of the file.

    ID is an expert, "news/e8", or a layer, "news". An expert comes with the gate that the file declares for its layer,
    in one epoch: the gate must pick among all experts that run and the new one, in the order of the file. What cannot
    serve changes nothing. It is kept for the next start. Its code must be in `allowed_factories` of the cluster.

    \b
    Examples:
      expertmesh add mesh.yaml news/e8
      expertmesh add mesh.yaml weather -o json
    """
    began = time.monotonic()
    config = load_config(mesh, {} if name is None else {"name": name})
    with connect(name or (None if endpoint else config.name), endpoint, ca_cert) as client:
        runs = client.declared()
        plan = plan_changes(runs, with_one(runs, wanted_document(config), id))
        course = Course(
            client=client,
            gates={layer.gate_id: layer.gate for layer in config.layers},
            factories=runs["settings"].get("allowed_factories"),
            allow_unverified=allow_unverified,
        )
        course.check_possible(plan.steps)
        (outcome,) = course.make(plan.steps, lambda line: click.echo(line, err=True))
    _print(outcome, f"added in {time.monotonic() - began:.1f} s", output)


@click.command()
@click.argument("id")
@click.option(
    "--gate",
    type=click.Path(path_type=Path),
    help="File of the layer's new gate, as `Gate.save` writes it; not for a layer or a shared expert.",
)
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds until it is gone.")
@cluster_options
@output_option
def remove(
    id: str,
    gate: Path | None,
    timeout: float,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Remove an expert, "news/e8", or a layer, "news", from a running cluster.

    An expert goes with the layer's new gate, in one epoch. Requests that have begun are answered by it; its replicas
    are ended once no request can need it. It stays away after a restart, until `serve --redeclare news/layer`.

    \b
    Examples:
      expertmesh remove news/e8 --gate gate-8.safetensors
      expertmesh remove weather
    """
    began = time.monotonic()
    is_layer = "/" not in id
    if is_layer and gate is not None:
        raise click.UsageError("a layer is removed with its gate: leave --gate out")
    with connect(name, endpoint, ca_cert) as client:
        if is_layer:
            outcome = client.remove_layer(id, timeout=timeout)
        else:
            outcome = client.remove_expert(id, gate=gate, timeout=timeout)
    _print(outcome, f"removed in {time.monotonic() - began:.1f} s", output)


def with_one(runs: Document, wanted: Document, id: str) -> Document:
    """What runs, with one expert, and its layer's gate, or one layer of what is wanted.

    Raises NotFound where that is not declared, and InvalidRequest where it runs already.
    """
    layer, _, expert = id.partition("/")
    kind = "experts" if expert else "layers"
    if id not in wanted[kind]:
        raise NotFound(f"the file declares no {kind[:-1]} {id!r}; it has {', '.join(sorted(wanted[kind])[:20])}")
    if id in runs[kind]:
        raise InvalidRequest(f"{id} runs already: `expertmesh apply` brings what is edited in the file")
    if expert and layer not in runs["layers"]:
        raise NotFound(f"the cluster has no layer {layer!r}: add it first, with `expertmesh add MESH {layer}`")
    ids = {id} if expert else {f"{layer}/{name}" for group in ("experts", "shared") for name in wanted[kind][id][group]}
    groups = {wanted["places"][one]["group"] for one in ids}
    new = {*ids, *(groups - runs["replicas"].keys()), f"{layer}/{GATE}", *(() if expert else (layer,))}
    found: dict[str, dict[str, Any]] = {
        section: {**runs[section], **{key: value for key, value in wanted[section].items() if key in new}}
        for section in SECTIONS
        if section != "settings"
    }
    found["settings"] = dict(runs["settings"])
    if expert:
        found["layers"][layer] = _with_expert(runs["layers"][layer], wanted["layers"][layer], expert)
    return found


def _with_expert(runs: Mapping[str, Any], wanted: Mapping[str, Any], expert: str) -> dict[str, Any]:
    """The lists of a layer's experts with a new one where the file has it: behind those that are before it there."""
    lists = {}
    for group in ("experts", "shared"):
        names = list(runs[group])
        if expert in wanted[group]:
            before = [name for name in wanted[group][: wanted[group].index(expert)] if name in names]
            names.insert(names.index(before[-1]) + 1 if before else 0, expert)
        lists[group] = names
    return {**runs, **lists}


def _print(outcome: Mapping[str, Any], line: str, output: str) -> None:
    if output == "json":
        print_json(dict(outcome))
        return
    rows = [
        (layer, ", ".join(names["before"]) or "-", ", ".join(names["after"]) or "-")
        for layer, names in outcome["layers"].items()
    ]
    new_console().print(new_table(None, ("layer", "experts before", "after"), rows))
    click.echo(f"{line}; epoch {outcome['epoch']}")
