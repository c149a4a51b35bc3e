"""What is checked and written before candidates are published."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ....experts.errors import FailedPrecondition
from ....experts.wire import WireTensor, bfloat16_to_float32
from ...rpc.training import error_of
from .delivery import Connection
from .options import Passed
from .updates import Part


class Candidates(Protocol):
    """What is asked of a session."""

    layer: str
    versions: dict[str, str]

    def forward(
        self, parts: Sequence[Part], tensors: dict[str, WireTensor], seed: int, *, training: bool = True
    ) -> Passed:
        """A forward pass of the candidates."""


def check_probe(session: Candidates, connection: Connection, probe: Any, max_drift: float | None) -> None:
    """Check the answers of each candidate to rows `probe` [T, ...] against those of the version that it would replace.

    Raises FailedPrecondition for one whose relative L2 distance is not finite, or above `max_drift`.
    """
    rows = np.ascontiguousarray(np.asarray(probe))
    tensors = {"rows": WireTensor.from_numpy(rows), "index": WireTensor.from_numpy(np.arange(len(rows)))}
    for id, version in session.versions.items():
        new = session.forward([(id, "", 0, len(rows), 0)], tensors, 0, training=False)
        meta = {"op": "forward", "layer": session.layer, "parts": [[id, version, 0, len(rows), 0]]}
        frame = connection._training("Pass", meta, tensors)
        outcome: Mapping[str, Any] = frame.meta["outcomes"][0]
        if "error" in outcome:
            raise error_of(outcome)
        before, after = (_wide(found["outputs"]) for found in (frame.tensors, new.tensors))
        drift = float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-12))
        if not math.isfinite(drift) or (max_drift is not None and drift > max_drift):
            raise FailedPrecondition(
                f"{id} answers the probe rows with a drift of {drift:.3g}, above max_drift {max_drift}: nothing was "
                "published"
            )


def saved_gate(gate: Any, folder: Path) -> Any:
    """The file of a gate, written to a folder where it is an object."""
    if isinstance(gate, (str, os.PathLike)):
        return gate
    path = folder / "gate.safetensors"
    gate.save(path)
    return path


def _wide(tensor: WireTensor) -> Any:
    values = tensor.to_numpy()
    return (bfloat16_to_float32(values) if tensor.dtype == "bfloat16" else values).astype(np.float64)
