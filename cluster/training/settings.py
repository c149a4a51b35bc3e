"""The file of `expertmesh train`: what is trained, on which rows, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError
from ...router.mixture.layer import Layer
from ..config.document import Mistakes, as_map, each
from ..config.loader import load_config
from ..config.records import filled, typed
from ..config.yaml_file import read_document, read_trusted
from .data import TrainingData, read_data
from .phases import Phase
from .trainer import PHASES
from .written import MESH

HOW = (
    "loss", "batch", "subsets", "nearest", "share", "balance", "explore", "dropout", "optimizer", "arguments",
    "replicas", "seed", "save_every", "tensorboard",
)  # fmt: skip
"""The settings that are arguments of `Trainer`."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a file; paths are relative to it. `Trainer` says what those of training mean.

    `mesh` declares the layer, as for `expertmesh serve`; `layer` names it, if the file has several. `data` and `label`
    are those of `read_data`. `out` is the folder of checkpoints and of what is written.
    """

    mesh: str = ""
    layer: str = ""
    data: str = ""
    label: str = ""
    held_out: float = 0.2
    out: str = "trained"
    loss: str | None = None
    batch: int = 128
    subsets: str = "cluster"
    nearest: int = 1
    share: float = 0.2
    balance: float = 0.01
    explore: float = 0.0
    dropout: float = 0.0
    optimizer: str = "torch.optim:AdamW"
    arguments: dict[str, Any] = field(default_factory=dict)
    replicas: str = "first"
    seed: int = 0
    save_every: float = 30.0
    tensorboard: bool = False
    phases: tuple[Phase, ...] = PHASES

    def trainer_options(self) -> dict[str, Any]:
        """The arguments of `Trainer`."""
        return {name: getattr(self, name) for name in HOW} | {"phases": self.phases}


@dataclass(frozen=True)
class TrainFile:
    """A file of settings, read: the settings, the layer, the rows, and the folder that it writes to."""

    settings: TrainSettings
    layer: Layer
    data: TrainingData
    out: Path


def read_train_file(path: Path) -> TrainFile:
    """Read the file of a training, and what it names. Raises one ConfigError that lists every mistake as file:line."""
    document = read_document(read_trusted(path), str(path), needs="mesh` and `data")
    wrong = Mistakes()
    settings = filled(TrainSettings(), document.data, "a training", wrong, {"phases": _phases})
    for key in ("mesh", "data"):
        if not getattr(settings, key):
            with wrong.at():
                file = "mesh.yaml" if key == "mesh" else "rows.csv"
                raise ConfigError(f"`{key}` is missing: name a file, as in `{key}: {file}`")
    document.raise_if_wrong(wrong.found)
    folder = path.absolute().parent
    if (folder / settings.out / MESH).resolve() == (folder / settings.mesh).resolve():
        raise ConfigError(
            f"{path}: `out` is the folder of {settings.mesh}, which the result would replace: name another"
        )
    if (folder / settings.out).exists() and not (folder / settings.out).is_dir():
        raise ConfigError(f"{path}: `out` is {settings.out!r}, which is no folder: name another")
    layers = {layer.name: layer for layer in load_config(folder / settings.mesh, {}, {}).layers}
    name = settings.layer or next(iter(layers))
    if name not in layers or (not settings.layer and len(layers) > 1):
        raise ConfigError(f"{path}: set `layer` to one of {', '.join(layers)}")
    data = read_data(folder / settings.data, label=settings.label, held_out=settings.held_out, seed=settings.seed)
    return TrainFile(settings, layers[name], data, folder / settings.out)


def _phases(declared: Any) -> tuple[Phase, ...]:
    if not isinstance(declared, list):
        raise ConfigError("phases must be a list, as in `- {kind: experts, epochs: 10}`")
    return tuple(each(dict(enumerate(declared)), _phase).values())


def _phase(number: int, declared: object) -> Phase:
    entries: Mapping[str, Any] = as_map(declared, "a phase")
    if unknown := sorted(entries.keys() - {item.name for item in fields(Phase)}):
        raise ConfigError(f"a phase has no key {unknown[0]!r}; its keys are {', '.join(i.name for i in fields(Phase))}")
    for key, value in entries.items():
        typed(Phase, key, value)
    if "kind" not in entries:
        raise ConfigError("a phase needs a kind: experts, gate or joint")
    return Phase(**entries)
