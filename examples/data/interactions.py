"""Who used what, and how much: which functions the files of Python's standard library call, or a CSV file."""

from __future__ import annotations

import ast
import csv
import io
import math
import statistics
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.examples.data.prose import read_text
from expertmesh.experts.errors import ConfigError

COLUMNS = ("user", "item", "rating")
LEAST_EACH = 5
"""How many interactions a user, and an item, must have."""
LEAST = 200
MOST_FIELD = 1 << 16
NOT_OURS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}

Ratings = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Interactions:
    """N pairs of a user and an item, by number, int64 [N], and whether the rating is above the median, float [N]."""

    users_N: Tensor
    items_N: Tensor
    high_N: Tensor
    users: tuple[str, ...]
    items: tuple[str, ...]


def standard_library() -> Interactions:
    """Which functions and methods each file of the standard library calls; the rating is how often.

    Sources are parsed, never imported. Raises ConfigError if this Python's standard library has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    ratings: Ratings = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not NOT_OURS & set(name.parts):
            ratings |= {(name.as_posix(), item): float(count) for item, count in Counter(_calls(path)).items()}
    return interactions(ratings, str(folder))


def _calls(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):  # a template, or a file for another Python version: skip it
        return
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    yield from (
        function.id if isinstance(function, ast.Name) else f".{function.attr}"
        for function in called
        if isinstance(function, (ast.Name, ast.Attribute))
    )


def read_csv(path: Path) -> Interactions:
    """Read the columns user, item and rating of a CSV file in UTF-8; of repeated pairs the last rating counts.

    Raises ConfigError, with the row.
    """
    before = csv.field_size_limit(MOST_FIELD)
    lines = csv.reader(io.StringIO(read_text(path, 1).decode(), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        for column in COLUMNS:
            if header.count(column) != 1:
                named = ", ".join(header)[:100]
                raise ConfigError(f"{path}:1: there must be one column {column!r}; the columns are {named}")
        places = [header.index(column) for column in COLUMNS]
        ratings: Ratings = {}
        for line in filter(None, lines):
            where = f"{path}:{lines.line_num}"
            if len(line) != len(header):
                raise ConfigError(f"{where}: {len(line)} fields, but the header has {len(header)}: mend the row")
            user, item, rating = (line[place].strip() for place in places)
            if not user or not item:
                raise ConfigError(f"{where}: user or item is missing: fill it in, or remove the row")
            ratings[user, item] = _number(where, rating)
    except csv.Error as error:
        raise ConfigError(f"{path}:{lines.line_num}: it cannot be read as CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    return interactions(ratings, str(path))


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: rating is {text[:40]!r}, not a finite number: mend it, or remove the row")
    return value


def interactions(ratings: Mapping[tuple[str, str], float], source: str) -> Interactions:
    """Number users and items, without those that have too few interactions. Raises ConfigError if too few are left."""
    kept, count = dict(ratings), -1
    while count != len(kept):
        count = len(kept)
        users, items = Counter(user for user, _ in kept), Counter(item for _, item in kept)
        kept = {pair: r for pair, r in kept.items() if min(users[pair[0]], items[pair[1]]) >= LEAST_EACH}
    if len(kept) < LEAST:
        raise ConfigError(
            f"{source}: {len(kept)} interactions are left of users and items with {LEAST_EACH} or more of them: at "
            f"least {LEAST} are needed"
        )
    median, most = statistics.median(kept.values()), max(kept.values())
    if min(kept.values()) == most:
        raise ConfigError(f"{source}: every rating is {most:g}: at least two different ones are needed")
    named = [sorted({pair[place] for pair in kept}) for place in (0, 1)]
    users_of, items_of = ({name: number for number, name in enumerate(names)} for names in named)
    return Interactions(
        torch.tensor([users_of[user] for user, _ in kept]),
        torch.tensor([items_of[item] for _, item in kept]),
        torch.tensor([float(r > median if most > median else r >= median) for r in kept.values()]),
        tuple(named[0]),
        tuple(named[1]),
    )
