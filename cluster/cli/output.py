"""Output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

Command = TypeVar("Command", bound=Callable[..., Any])

_STYLES = {"ok": "green", "ready": "green", "warn": "yellow", "fail": "red", "dead": "red", "down": "red"}
_WIDTH = 160  # columns when standard output is not a terminal


def output_option(command: Command) -> Command:
    """Add the option `-o table|json`, passed as the argument `output`."""
    option = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Output format.",
    )
    return option(command)


def new_console() -> Console:
    """A console on standard output that prints text literally: no markup, no highlighting."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False, emoji=False)


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, default=str))


def new_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of plain cells: numbers align right, states have a colour, None is a dash."""
    cells = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], (int, float)) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(shown(cell), style=_STYLES.get(str(cell), "")) for cell in row))
    return table


def shown(value: object) -> str:
    """A cell as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
