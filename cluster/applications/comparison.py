"""An application over several seeds: each one's result is kept in a file, so that an interrupted run goes on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError
from ..machine.durable_files import write_private
from ..machine.folder_lock import alone_in
from .result import Job, Measured, Result, from_document

RESULT = "result.json"
ASKED = "asked.json"
Application = Callable[[Job], Result]


@dataclass(frozen=True)
class Figure:
    """The mean of a figure over seeds, and its spread: the standard deviation of a seed, 0 for one seed."""

    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if not self.spread else f"{self.mean:.4g} ± {self.spread:.2g}"


@dataclass(frozen=True)
class Comparison:
    """The results of an application, by seed."""

    name: str
    results: Mapping[int, Result]

    @property
    def ok(self) -> bool:
        """Whether each live update was published, and no request failed or mixed versions."""
        return all(result.update.ok for result in self.results.values())

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the quality's figures, the one that counts first."""
        return tuple(self._first.models[0].quality)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of the table."""
        return tuple(model.model for model in self._first.models)

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower first figure is better."""
        return self._first.lower_is_better

    def quality(self, model: str, figure: str) -> Figure:
        """A figure of a model over the seeds."""
        return figure_of([own.quality[figure] for own in self.of(model)])

    def of(self, model: str) -> Sequence[Measured]:
        """A model's measurements, by seed."""
        return [own for result in self.results.values() for own in result.models if own.model == model]

    def rows(self) -> list[list[object]]:
        """The cells of the table: a line for each model."""
        lines: list[list[object]] = []
        for name in self.models:
            own = self.of(name)
            served = [one.rows_per_second for one in own if one.rows_per_second is not None]
            seconds = [one.seconds for one in own if one.seconds is not None]
            lines.append(
                [
                    name,
                    *(str(self.quality(name, figure)) for figure in self.figures),
                    own[0].active,
                    own[0].parameters,
                    round(statistics.mean(one.flops for one in own)),
                    round(statistics.mean(seconds), 1) if seconds else None,
                    round(statistics.mean(served)) if served else None,
                ]
            )
        return lines

    def columns(self) -> list[str]:
        """The heads of the table's columns."""
        held = [f"held-out {figure}" for figure in self.figures]
        return ["model", *held, "active parameters", "parameters", "flop/row", "training s", "served rows/s"]

    def as_dict(self) -> dict[str, Any]:
        """All results in plain JSON types."""
        results = {str(seed): asdict(result) for seed, result in self.results.items()}
        return {"application": self.name, "ok": self.ok, "results": results}

    @property
    def _first(self) -> Result:
        return next(iter(self.results.values()))


def compare(application: Application, name: str, seeds: Sequence[int], job: Job) -> Comparison:
    """Run an application once for each seed, in a folder of its own; a seed whose result is there is not run again.

    Raises ConfigError for a folder of a run that was asked for something else, FailedPrecondition while another process
    is at work there, and what the application raises: then what it had begun is kept, and nothing if it had not.
    """
    was_there = job.folder.exists()
    with alone_in(job.folder):
        try:
            return _compare(application, name, seeds, job)
        except BaseException:
            _remove_if_empty(job.folder, was_there=was_there)
            raise


def _compare(application: Application, name: str, seeds: Sequence[int], job: Job) -> Comparison:
    _check_same(job)
    results = {}
    for number, seed in enumerate(seeds):
        folder = job.folder / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        path = folder / RESULT
        if not path.is_file():
            told = f"seed {seed} ({number + 1}/{len(seeds)}): "
            own = Job(
                seed=seed, folder=folder, data=job.data, small=job.small, options=job.options,
                tell=lambda line, told=told: job.tell(told + line),  # type: ignore[misc]
            )  # fmt: skip
            write_private(path, json.dumps(asdict(application(own))))
        results[seed] = from_document(json.loads(path.read_text(encoding="utf-8")))
    return Comparison(name, results)


def _remove_if_empty(folder: Path, *, was_there: bool) -> None:
    """Remove the folders of seeds that hold nothing, and the whole one if there are no others."""
    for seed in folder.glob("seed-*"):
        with suppress(OSError):
            seed.rmdir()
    if not any(folder.glob("seed-*")):
        (folder / ASKED).unlink(missing_ok=True)
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def _check_same(job: Job) -> None:
    """Note what is asked for in the folder, or check that it is what was asked for before."""
    data = None if job.data is None else str(job.data.absolute())
    asked = {"data": data, "small": job.small, "options": dict(job.options)}
    path = job.folder / ASKED
    if not path.is_file():
        write_private(path, json.dumps(asked))
    elif json.loads(path.read_text(encoding="utf-8")) != asked:
        raise ConfigError(f"{job.folder} has results of other data or options: choose another folder, or remove it")


def figure_of(values: Sequence[float]) -> Figure:
    """Mean and spread of values."""
    return Figure(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
