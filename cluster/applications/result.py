"""What an application reports of one seed: the models it compared, and its live update. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .live_update import LiveUpdate


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of an application: one `seed`, whose checkpoints are in `folder`; pictures go there, too.

    `data` is the user's own file or folder, None for the default data. `small` asks for a run of seconds that shows
    that everything works, not how well. `options` are the application's own. `tell` is called with lines of progress.
    """

    seed: int
    folder: Path
    data: Path | None = None
    small: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on held-out rows. `quality` has its figures by name, the one that counts first.

    `parameters` are all, `active` those that a row meets; `flops` are the floating-point operations of a row, counted,
    `seconds` those of the training, and `rows_per_second` what the cluster answers through its client (None where the
    model was not served).
    """

    model: str
    quality: Mapping[str, float]
    parameters: int
    active: int
    flops: float
    seconds: float | None = None
    rows_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One seed of an application: the models in the order of the table, the live update, and lines to be printed.

    `lower_is_better` holds for the first figure, as for bits per byte. `pictures` are files in the job's folder.
    """

    models: tuple[Measured, ...]
    update: LiveUpdate
    lines: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    lower_is_better: bool = False


def from_document(document: Mapping[str, Any]) -> Result:
    """A result from plain JSON types, as `dataclasses.asdict` makes them."""
    models = tuple(Measured(**entry) for entry in document["models"])
    more = {name: tuple(document[name]) for name in ("lines", "pictures")}
    update = LiveUpdate(**document["update"])
    return Result(models=models, update=update, lower_is_better=document["lower_is_better"], **more)
