"""Rows to train on and rows held out, from tensors or from a file.

Shapes: T rows, which may have any trailing shape.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...experts.errors import ConfigError
from ...experts.weights.files import load_tensors

MOST_FIELD = 1 << 20


@dataclass(frozen=True)
class TrainingData:
    """Training rows x [T, ...] with targets y [T] (int64 classes) or [T, ...], and held-out ones of the same kinds.

    `names` are those of the classes, if they have any. Raises ConfigError for rows and targets that do not fit.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, x, y in (("training", self.x, self.y), ("held-out", self.held_x, self.held_y)):
            if not x.ndim or not y.ndim or len(x) != len(y):
                raise ConfigError(f"there are {list(x.shape)} {what} rows, but targets of {list(y.shape)}")
            if not len(x):
                raise ConfigError(f"there are no {what} rows: at least one is needed")
            _check_finite(x, f"{what} rows")
            _check_finite(y, f"{what} targets")
        if not self.y.is_floating_point():
            for name in ("y", "held_y"):
                object.__setattr__(self, name, getattr(self, name).long())
                if bool((getattr(self, name) < 0).any()):
                    raise ConfigError("classes must be 0 or more")
        if self.x.shape[1:] != self.held_x.shape[1:] or self.y.shape[1:] != self.held_y.shape[1:]:
            raise ConfigError("training and held-out rows must have the same shape")

    @property
    def is_classified(self) -> bool:
        """Whether targets are classes."""
        return not self.y.is_floating_point() and self.y.ndim == 1

    @classmethod
    def of(
        cls, x: Tensor, y: Tensor, *, held_out: float = 0.2, seed: int = 0, names: Sequence[str] = ()
    ) -> TrainingData:
        """Hold a share of the rows out, drawn with the seed. Raises ConfigError."""
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out must be between 0 and 1, not {held_out}")
        if len(x) < 2:
            raise ConfigError(f"there must be at least 2 rows, to train on and to hold out, not {len(x)}")
        _check_finite(x, "rows")
        _check_finite(y, "targets")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        count = min(len(x) - 1, max(1, round(held_out * len(x))))
        held, kept = order[:count].sort().values, order[count:].sort().values
        return cls(x[kept], y[kept], x[held], y[held], tuple(names))


def _check_finite(values: Tensor, what: str) -> None:
    if values.is_floating_point() and not bool(values.isfinite().all()):
        wrong = int((~values.reshape(len(values), -1).isfinite()).any(dim=1).nonzero()[0])
        raise ConfigError(f"{what} must be finite, but those of row {wrong} are not (NaN or infinity)")


def read_data(path: Path, *, label: str = "", held_out: float = 0.2, seed: int = 0) -> TrainingData:
    """Read a safetensors file with x and y (and held_x and held_y, if they are chosen already), or a CSV file.

    A CSV file has a header; `label` names the column of the targets, by default the last one; all others are features,
    numbers. Labels that are whole numbers of 0 or more are the classes themselves, and numbers with a fraction are
    regressed; all others are names of classes, in the order of the alphabet.

    Raises NotFound, DataLoss or ConfigError, with file and line.
    """
    if path.suffix == ".safetensors":
        tensors, _ = load_tensors(path)
        if missing := {"x", "y"} - tensors.keys():
            raise ConfigError(f"{path}: it has no tensor {min(missing)!r}: name the rows x and the targets y")
        if {"held_x", "held_y"} <= tensors.keys():
            return TrainingData(tensors["x"], tensors["y"], tensors["held_x"], tensors["held_y"])
        return TrainingData.of(tensors["x"], tensors["y"], held_out=held_out, seed=seed)
    return _read_csv(path, label, held_out, seed)


def _read_csv(path: Path, label: str, held_out: float, seed: int) -> TrainingData:
    rows: list[list[float]] = []
    targets: list[str] = []
    before = csv.field_size_limit(MOST_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, None)
            if not header or len(header) < 2:
                raise ConfigError(f"{path}:1: a header with at least one feature and the label is needed")
            if label and label not in header:
                raise ConfigError(f"{path}:1: there is no column {label!r}; the columns are {', '.join(header)}")
            at = header.index(label) if label else len(header) - 1
            for line in lines:
                if not line:
                    continue
                if len(line) != len(header):
                    raise ConfigError(f"{path}:{lines.line_num}: {len(line)} fields, but the header has {len(header)}")
                rows.append([_number(path, lines.line_num, header[i], v) for i, v in enumerate(line) if i != at])
                targets.append(line[at].strip())
                if not targets[-1]:
                    raise ConfigError(f"{path}:{lines.line_num}: the label {header[at]!r} is missing")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {str(path)!r}") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ConfigError(f"{path}: it cannot be read as CSV in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(before)
    if not rows:
        raise ConfigError(f"{path}: it has no rows below its header")
    y, names = _targets(path, targets)
    return TrainingData.of(torch.tensor(rows), y, held_out=held_out, seed=seed, names=names)


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{path}:{line}: {column} is {text[:40]!r}, not a number") from None
    if not math.isfinite(value):
        raise ConfigError(f"{path}:{line}: {column} is {text[:40]!r}, not a finite number")
    return value


def _targets(path: Path, texts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Classes, by number or in the order of their names, or numbers [T, 1] where one has a fraction."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if numbers and any(not number.is_integer() for number in numbers if math.isfinite(number)):
        return torch.tensor(numbers)[:, None], ()
    names = sorted(set(texts))
    if len(names) >= 2 and numbers and all(number.is_integer() and number >= 0 for number in numbers):
        return torch.tensor([int(number) for number in numbers]), ()
    if len(names) < 2:
        raise ConfigError(f"{path}: all rows have the label {names[0]!r}: at least two are needed")
    place = {name: number for number, name in enumerate(names)}
    return torch.tensor([place[text] for text in texts]), tuple(names)
