"""The report of a tool: plain figures before and after, for JSON or as a table of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

Figure = float | int | None
"""A figure; None where it was not measured or is not defined."""


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    before: Figure
    after: Figure


@dataclass(frozen=True, kw_only=True)
class Report:
    """The base of all reports: frozen dataclasses of plain values, changes, and changes by name.

    `str(report)` is its table: plain values in the first line, then a line for each change.
    """

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON types; a change is {"before": ..., "after": ...}."""
        return asdict(self)

    def __str__(self) -> str:
        values = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}
        plain, lines = [], [("", "before", "after")]
        for name, value in values.items():
            if isinstance(value, Change):
                lines.append(_line(name, value))
            elif isinstance(value, Mapping):
                lines += [_line(f"{name}: {key}", change) for key, change in value.items()]
            elif value is not None:
                plain.append(f"{name} {_plain(value)}")
        return "\n".join([*([", ".join(plain)] if plain else []), *aligned(lines)])


def aligned(lines: list[tuple[str, str, str]]) -> list[str]:
    """Lines of text from rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(cells[column]) for cells in lines) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}".rstrip() for name, before, after in lines
    ]


def _line(name: str, change: Change) -> tuple[str, str, str]:
    return name, _text(change.before), _text(change.after)


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_plain(item) for item in value)
    return _text(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _text(figure: Figure) -> str:
    if figure is None:
        return "-"
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.4g}"
