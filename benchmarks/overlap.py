"""Two runs of the bench side by side: `python -m benchmarks.overlap ONE.json TWO.json`.

A ratio that belongs to machine and code, and not to the minute, has intervals that overlap, but for some by chance.
Ends with status 1 where two do not overlap, or a line is in one of the runs only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Pair:
    """The same line of two runs; a run that lacks it has None."""

    one: Mapping[str, Any] | None
    two: Mapping[str, Any] | None

    @property
    def overlaps(self) -> bool | None:
        """Whether the intervals of the two ratios share a value; None where the line is a figure without one."""
        if self.one is None or self.two is None:
            return False
        if not self.one["ratio"] and not self.two["ratio"]:
            return None
        if not self.one["ratio"] or not self.two["ratio"]:
            return False
        first, second = self.one["ratio"], self.two["ratio"]
        if None in (*first.values(), *second.values()):  # what is not finite is null in JSON
            return False
        return bool(max(first["low"], second["low"]) <= min(first["high"], second["high"]))


def paired(one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]]) -> Iterator[Pair]:
    """The lines of two runs: of those that say the same first, then by their place within what is left of their row.

    What a line says may name a rate that was measured.
    """
    left = list(two)
    alone: list[Mapping[str, Any]] = []
    for line in one:
        same = next((other for other in left if all(other[key] == line[key] for key in ("row", "what", "ours"))), None)
        if same is None:
            alone.append(line)
        else:
            left.remove(same)
            yield Pair(line, same)
    for row in dict.fromkeys(line["row"] for line in (*alone, *left)):
        first, second = ([line for line in lines if line["row"] == row] for lines in (alone, left))
        for pair in zip_longest(first, second):
            yield Pair(*pair)


def main(arguments: list[str] | None = None) -> int:
    """Show the pairs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("one", type=Path, metavar="ONE.json", help="what `python -m benchmarks --json` wrote")
    parser.add_argument("two", type=Path, metavar="TWO.json")
    options = parser.parse_args(arguments)
    one, two = (json.loads(path.read_text())["lines"] for path in (options.one, options.two))
    found = list(paired(one, two))
    table = Table("row", "what", "ours", "first", "second", "overlap")
    for pair in found:
        line = pair.one or pair.two or {}
        said = {True: "yes", False: "NO", None: ""}[pair.overlaps]
        table.add_row(line["row"], escape(line["what"]), line["ours"], _said(pair.one), _said(pair.two), said)
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    apart = sum(pair.overlaps is False for pair in found)
    print(f"{sum(pair.overlaps is True for pair in found)} ratios overlap, {apart} do not")
    return 1 if apart else 0


def _said(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return "missing"
    if not line["ratio"]:
        return _number(line["value"])
    median, low, high = (_number(line["ratio"][key]) for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}"


if __name__ == "__main__":
    sys.exit(main())
