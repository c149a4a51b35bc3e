"""What a training tells: progress, a line for each epoch in a CSV file and for TensorBoard, and its report.

No time is read here: the trainer says how long things took.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...experts.errors import MissingExtra

COLUMNS = ("phase", "epoch", "step", "loss", "held_out", "lr", "rows_per_second", "load")


@dataclass(frozen=True)
class Progress:
    """Where a training is: `step` of `steps` of a phase; the recent mean loss, rows/s, and the seconds left of it."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    rows_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        left = f"{self.seconds_left:.0f} s left" if math.isfinite(self.seconds_left) else ""
        return (
            f"{self.phase}: epoch {self.epoch}/{self.epochs}, step {self.step}/{self.steps}, loss {self.loss:.4f}, "
            f"{self.rows_per_second:,.0f} rows/s, {left}"
        ).rstrip(", ")


Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its mean loss, and the held-out figure after it (accuracy of classes, else the mean loss).

    `load` is the share of the gate's choices that each expert got; empty where the gate was not asked.
    """

    phase: str
    epoch: int
    step: int
    loss: float
    held_out: float
    lr: float
    rows_per_second: float
    load: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainingReport:
    """All epochs, the held-out figure before and after, and what that is: "accuracy" or "loss"."""

    figure: str
    before: float
    after: float
    epochs: tuple[EpochResult, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report in plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """A line for each phase, and what it began and ended with, as text."""
        lines = [("phase", "epochs", "steps", "loss", f"held-out {self.figure}", "rows/s")]
        before = self.before
        for phase in dict.fromkeys(result.phase for result in self.epochs):
            own = [result for result in self.epochs if result.phase == phase]
            first, last = own[0], own[-1]
            rate = sum(result.rows_per_second for result in own) / len(own)
            lines.append(
                (
                    phase,
                    str(len(own)),
                    str(last.step),
                    f"{first.loss:.4f} -> {last.loss:.4f}",
                    f"{before:.4f} -> {last.held_out:.4f}",
                    f"{rate:,.0f}",
                )
            )
            before = last.held_out
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in padded)


class Log:
    """Writes each epoch to `train.csv` in a folder, and to TensorBoard if asked to; nothing without a folder."""

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, after: Sequence[EpochResult] = ()) -> None:
        """`after` are the epochs that are kept of what is there: a resumed training goes on from them.

        Raises MissingExtra where TensorBoard is asked for and not installed.
        """
        self._path = None if folder is None else folder / "train.csv"
        self._board: Any = None
        if self._path is not None:
            with self._path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)
            for result in after:
                self._line(result)
        if tensorboard and folder is not None:
            self._board = _summary_writer(folder / "tensorboard")

    def add(self, result: EpochResult) -> None:
        """Write an epoch."""
        self._line(result)
        if self._board is not None:
            for name in ("loss", "held_out", "lr", "rows_per_second"):
                self._board.add_scalar(f"{result.phase}/{name}", getattr(result, name), result.step)
            for expert, share in enumerate(result.load):
                self._board.add_scalar(f"{result.phase}/load/{expert}", share, result.step)
            self._board.flush()

    def close(self) -> None:
        """Close what TensorBoard reads."""
        if self._board is not None:
            self._board.close()

    def _line(self, result: EpochResult) -> None:
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([_cell(getattr(result, name)) for name in COLUMNS])


def _summary_writer(folder: Path) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    except ImportError:
        raise MissingExtra("TensorBoard is not installed: pip install tensorboard, or leave tensorboard out") from None


def _cell(value: object) -> object:
    return " ".join(f"{share:.4f}" for share in value) if isinstance(value, tuple) else value


def shares_of(load_E: Tensor) -> tuple[float, ...]:
    """The share of all choices that each expert got, rounded; empty if there were none."""
    total = int(load_E.sum())
    return tuple(round(count / total, 4) for count in load_E.tolist()) if total else ()


def results_of(text: str) -> tuple[EpochResult, ...]:
    """The epochs of a JSON text that `json.dumps` made of them."""
    return tuple(EpochResult(**{**entry, "load": tuple(entry["load"])}) for entry in json.loads(text))
