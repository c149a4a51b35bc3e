"""A second record of what was committed, in a small file with a checksum beside the registry.

A registry that was damaged, or that has lost its newest changes, is noticed by comparison with it and rebuilt from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...experts.errors import DataLoss
from ..machine.durable_files import sync_folder, write_private
from .records import EpochRecord, damaged, to_json

COMMITTED_FILE = "committed.json"


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The kept epochs of a registry, oldest first, and the digests of what was declared, by id.

    `replicas` are the numbers that were asked for, by expert or pack, and `replicas_change` counts their changes.
    """

    cluster_id: str
    epochs: tuple[EpochRecord, ...]
    declared: Mapping[str, str]
    replicas: Mapping[str, int] = field(default_factory=dict)
    replicas_change: int = 0

    @property
    def newest(self) -> int:
        """The number of the newest epoch; 0 before the first."""
        return self.epochs[-1].number if self.epochs else 0


def write_committed(folder: Path, committed: Committed) -> None:
    """Replace the record durably, in one step. Raises OSError."""
    text = to_json(asdict(committed), "the record of epochs")
    write_private(folder / COMMITTED_FILE, json.dumps({"committed": json.loads(text), "sha256": _sha256(text)}))
    sync_folder(folder)


def read_committed(folder: Path) -> Committed | None:
    """The record, or None where none was written yet. Raises DataLoss if it does not match its checksum."""
    try:
        whole = json.loads((folder / COMMITTED_FILE).read_bytes())
        if whole["sha256"] != _sha256(to_json(whole["committed"], "the record of epochs")):
            raise ValueError("checksum")
        fields = whole["committed"]
        epochs = tuple(EpochRecord(**epoch) for epoch in fields["epochs"])
        return Committed(
            cluster_id=fields["cluster_id"],
            epochs=epochs,
            declared=fields["declared"],
            replicas=fields.get("replicas", {}),  # an earlier build has none
            replicas_change=fields.get("replicas_change", 0),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise DataLoss(f"{COMMITTED_FILE} in state_dir is damaged: it does not match its checksum") from None


def check_not_behind(registry: Committed, recorded: Committed) -> None:
    """Compare a registry with the record. Raises DataLoss if it lacks what was committed, or says something else."""
    if registry.newest < recorded.newest:
        raise damaged(f"it is at epoch {registry.newest}, but epoch {recorded.newest} was committed")
    if registry.cluster_id != recorded.cluster_id:
        raise damaged("it is the registry of another cluster")
    if registry.replicas_change < recorded.replicas_change:
        raise damaged(
            f"it is at change {registry.replicas_change} of the numbers of replicas, "
            f"but change {recorded.replicas_change} was made"
        )
    theirs = {epoch.number: epoch for epoch in recorded.epochs}
    for epoch in registry.epochs:
        if theirs.get(epoch.number, epoch).versions != epoch.versions:
            raise damaged(f"epoch {epoch.number} has other versions than were committed")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
