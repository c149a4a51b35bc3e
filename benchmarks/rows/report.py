"""The result of a run as a table on the terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import MOST_FOREIGN
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .case import Condition
from .stages import MOST_UNEXPLAINED, NAMES, Stages
from .verdict import Line

BROKEN = "failed"
"""How the verdict of a row begins that could not be run to its end."""


def table(lines: Iterable[Line]) -> Table:
    """A line for each arm of ours."""
    found = Table(title="expertmesh against its limits and its peers", title_justify="left", show_lines=False)
    for name in ("row", "what", "ours", "baselines", "ratio [interval]", "target", "verdict", "CPU s / 1,000 rows"):
        found.add_column(name, overflow="fold")
    for line in lines:
        found.add_row(
            line.row,
            escape(line.what + (f" ({line.note})" if line.note else "")),
            f"{line.ours} {number(line.value)}",
            ", ".join(f"{name} {number(value)}" for name, value in line.baselines.items()),
            escape(str(line.ratio)) if line.ratio else "",
            line.target,
            _coloured(line.verdict) + (f" foreign load {line.foreign:.0%}" if line.foreign > MOST_FOREIGN else ""),
            ", ".join(f"{name} {number(value)}" for name, value in line.cpu.items()),
        )
    return found


def stage_table(stages: Mapping[Condition, Stages]) -> Table:
    """Where the time of one call goes, microseconds."""
    found = Table(title="one call at a time through the router, mean microseconds", title_justify="left")
    for name in ("what", *NAMES, "whole", "not explained"):
        found.add_column(name, justify="left" if name == "what" else "right")
    for condition, one in stages.items():
        share = f"{100 * one.unexplained:.1f} %"
        if abs(one.unexplained) > MOST_UNEXPLAINED:
            share = f"[red]{share}[/red]"
        what = f"{condition.shape} {condition.dtype}, {condition.rows} rows"
        found.add_row(what, *(f"{one.stages[name]:.0f}" for name in NAMES), f"{one.whole:.0f}", share)
    return found


def show(lines: Sequence[Line], stages: Mapping[Condition, Stages], facts: Mapping[str, Any]) -> None:
    """Print a result."""
    console = Console(width=200) if not Console().is_terminal else Console()
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    cpu = f"{facts['cpu']}, {facts['cores']} cores, bf16 instructions: {facts['bf16 instructions']}"
    console.print(f"{facts['when']}  {cpu}, {facts['memory GiB']} GiB; {versions}")
    console.print(f"load before: {facts['load before']}")
    console.print(table(lines))
    if stages:
        console.print(stage_table(stages))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result for machines, in one step; what is not a number is null."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    whole.replace(path)


def document(
    lines: Iterable[Line], stages: Mapping[Condition, Stages], facts: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A result as one mapping."""
    return {
        "machine": dict(facts),
        "lines": [asdict(line) for line in lines],
        "stages": [
            asdict(condition) | asdict(one) | {"unexplained": one.unexplained} for condition, one in stages.items()
        ],
        **more,
    }


def number(value: float) -> str:
    """A figure with three digits that count."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _coloured(verdict: str) -> str:
    colour = "green" if verdict.startswith("reached") else "red" if verdict.startswith("not") else "yellow"
    return f"[{colour}]{escape(verdict)}[/{colour}]" if verdict else ""


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
