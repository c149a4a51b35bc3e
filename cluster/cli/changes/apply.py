"""`expertmesh apply`: changes a running cluster to what a file declares, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ....experts.errors import FailedPrecondition
from ...config.loader import load_config, parse_override
from ...owner.wanted import wanted_document
from ...placement.change_plan import RESTART, Change, Plan, resumed
from ..connect import cluster_options, connect
from ..output import new_console, new_table, output_option, print_json
from .carrying_out import Course
from .journal import Begun, forget, keep, last_begun

_SHOWN = ("settings", "policies", "gates", "experts", "replicas", "autoscale")
"""The sections of which a step shows the changes; the others follow from them."""


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path), required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option("--undo", is_flag=True, help="Take back the last plan that was begun on the cluster.")
@click.option(
    "--allow-unverified", is_flag=True, help="Accept what cannot be tried, because no rows were declared or served."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override any key of the file; repeatable.")
@cluster_options
@output_option
def apply(
    mesh: Path | None,
    dry_run: bool,
    undo: bool,
    allow_unverified: bool,
    settings: tuple[str, ...],
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
) -> None:
    """Change a running cluster to what the YAML file MESH declares, step by step, under traffic.

    First the plan is printed: what is added comes before what uses it, and what is removed after its last use. What
    only a restart can change is said. What was swapped in by `expertmesh swap` serves on, as long as its declaration is
    the same. A plan of which the cluster cannot make every step is not begun. After a stop in the middle, the same
    command makes the steps that are left; --undo takes back those that were made, as far as `retain_epochs` keeps the
    versions before them. Code that is new to the cluster must be in its `allowed_factories`.

    \b
    Examples:
      expertmesh apply mesh.yaml --dry-run
      expertmesh apply mesh.yaml --set layers.news.experts.e3.weights=e3_v2.safetensors
      expertmesh apply --undo
    """
    if (mesh is None) != undo:
        raise click.UsageError("give the file to apply, or --undo")
    wanted, gates = None, {}
    if mesh is not None:
        overrides = dict(map(parse_override, settings))
        config = load_config(mesh, overrides if name is None else {**overrides, "name": name})
        name, wanted = None if endpoint else config.name, wanted_document(config)
        gates = {layer.gate_id: layer.gate for layer in config.layers}
    with connect(name, endpoint, ca_cert) as client:
        runs = client.declared()
        cluster = runs["settings"]["name"]
        begun = last_begun(cluster)
        if wanted is not None:
            plan = resumed(None if begun is None else begun.plan, runs, wanted)
        elif begun is None:
            raise FailedPrecondition(f"nothing to undo: you began no plan on cluster {cluster!r} from this machine")
        else:
            plan = begun.plan.undone()
        left = plan.remaining(runs)
        _print_plan(Plan(left, plan.restarts), plan.digest, output)
        if dry_run:
            return
        course = Course(
            client=client,
            gates=gates,
            versions=begun.versions if undo and begun else None,
            factories=runs["settings"].get("allowed_factories"),
            retain_epochs=runs["settings"].get("retain_epochs", 0),
            allow_unverified=allow_unverified,
        )
        course.check_possible(left)
        if left and not undo and len(left) == len(plan.steps):
            keep(cluster, Begun(plan, _versions(client.status())))
        course.make(left, _print_progress)
        if undo:
            forget(cluster)


def _versions(status: Mapping[str, Any]) -> dict[str, str]:
    """The versions that serve, by id."""
    versions = {}
    for layer in status["layers"].values():
        versions[layer["gate"]["id"]] = layer["gate"]["version"]
        versions |= {id: expert["version"] for id, expert in layer["experts"].items()}
    return versions


def _print_progress(line: str) -> None:
    click.echo(line, err=True)


def _print_plan(plan: Plan, digest: str, output: str) -> None:
    """Print the steps that are left of the plan with a digest."""
    if output == "json":
        print_json({**plan.to_json(), "digest": digest})
        return
    rows = list(_rows(plan))
    if rows:
        new_console().print(new_table(None, ("step", "", "what", "runs", "wanted"), rows))
    if plan.restarts:
        click.echo("what needs a restart is not changed: stop the cluster and start it with the file")
    click.echo(f"{len(plan.steps)} steps, plan {digest[:12]}" if plan.steps else "nothing to do")


def _rows(plan: Plan) -> Iterator[tuple[object, ...]]:
    for number, step in enumerate(plan.steps, start=1):
        lead: tuple[object, object] = (str(number), step.kind)
        for change in step.changes:
            if change.section in _SHOWN:
                yield (*lead, *_cells(change))
                lead = ("", "")
    for change in plan.restarts:
        yield ("-", RESTART, *_cells(change))


def _cells(change: Change) -> tuple[str, str | None, str | None]:
    before, after = change.before, change.after
    if change.section == "policies":
        before, after = _only_what_differs(before, after)
    runs, wanted = (None if value is None else _text(change.section, value) for value in (before, after))
    if runs == wanted:
        wanted = f"{wanted}, with other code or tensors"
    about = "" if change.section in ("settings", "gates", "experts") else f" {change.section}"
    return f"{change.key}{about}", runs, wanted


def _only_what_differs(before: Any, after: Any) -> tuple[Any, Any]:
    if before is None or after is None:
        return before, after
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: before.get(key) for key in keys}, {key: after.get(key) for key in keys}


def _text(section: str, value: Any) -> str:
    if section == "gates":
        return f"{value['type']}({_arguments(value['arguments'] or {})})"
    if section == "experts":
        arguments = ", ".join(filter(None, (*map(_short, value["args"]), _arguments(value["kwargs"]))))
        return f"{value['factory'] or 'a live object'}{arguments and f'({arguments})'}"
    return _arguments(value) if isinstance(value, dict) else str(value)


def _arguments(named: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in named.items() if value is not None)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
