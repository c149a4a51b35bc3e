"""What is checked and written before candidates are published."""

from __future__ import annotations

import math
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ....experts.errors import FailedPrecondition, InvalidRequest, NotFound
from ....experts.wire import WireTensor, bfloat16_to_float32
from ...rpc.swaps import SwapOutcome
from ...rpc.training import error_of
from ..arrays import to_wire
from .delivery import Connection, Delivery
from .options import Passed
from .updates import Part


class Candidates(Protocol):
    """What is asked of a session."""

    layer: str

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions that the candidates would replace, by id."""

    def forward(
        self, parts: Sequence[Part], tensors: dict[str, WireTensor], seed: int, *, training: bool = True
    ) -> Passed:
        """A forward pass of the candidates."""


def check_probe(
    session: Candidates, connection: Connection, experts: Sequence[str], probe: Any, max_drift: float | None
) -> None:
    """Check the answers of candidates to rows `probe` [T, ...] against those of the versions that they would replace.

    Raises FailedPrecondition for one whose relative L2 distance is not finite, or above `max_drift`.
    """
    rows, _ = to_wire(probe, name="probe")
    if not rows.shape or not rows.shape[0]:
        raise InvalidRequest("probe must be rows, [T, ...]")
    count = rows.shape[0]
    tensors = {"rows": rows, "index": WireTensor.from_numpy(np.arange(count))}
    for id in experts:
        version = session.versions[id]
        new = session.forward([(id, "", 0, count, 0)], tensors, 0, training=False)
        for error in new.left_out.values():
            raise error
        meta = {"op": "forward", "layer": session.layer, "parts": [[id, version, 0, count, 0]]}
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


class Publications:
    """The versions that candidates were copied from, or published as last, by id.

    The id of a swap is noted before it is asked for, so that whoever resumes the session finds out what became of it.
    """

    def __init__(
        self, connection: Connection, delivery: Delivery, versions: Mapping[str, str], publishing: str
    ) -> None:
        """`publishing` is the id of a swap whose outcome was not noted, if there is one."""
        self.versions = dict(versions)
        self._connection = connection
        self._delivery = delivery
        self._publishing = publishing

    def swap(
        self,
        contents: Mapping[str, bytes],
        gate_id: str,
        gate: Any,
        expect: Mapping[str, str] | None,
        **options: Any,
    ) -> SwapOutcome:
        """Swap in weights by id, and the gate where there is one: a file, or an object with a `save(path)` method."""
        if self._publishing:
            self._noted(committed_by(self._connection, self._publishing, list(self.versions)))
        self._publishing = uuid.uuid4().hex
        self._delivery.send({"op": "rebase", "versions": {}, "publishing": self._publishing}, [], {})
        with tempfile.TemporaryDirectory(prefix="expertmesh-train-") as folder:
            changes: dict[str, Any] = {}
            for number, (id, content) in enumerate(contents.items()):
                path = changes[id] = Path(folder) / f"{number}.safetensors"
                path.write_bytes(content)
            if isinstance(gate, (str, os.PathLike)):
                changes[gate_id] = gate
            elif gate is not None:
                path = changes[gate_id] = Path(folder) / "gate.safetensors"
                gate.save(path)
            expect = {id: self.versions[id] for id in contents} if expect is None else expect
            outcome = self._connection.swap(changes, expect=expect, swap_id=self._publishing, **options)
        self._noted(outcome.after if outcome.committed else {})
        return outcome

    def _noted(self, after: Mapping[str, str]) -> None:
        self.versions |= {id: version for id, version in after.items() if id in self.versions}
        self._delivery.send({"op": "rebase", "versions": self.versions, "publishing": ""}, [], {})
        self._publishing = ""


def committed_by(connection: Connection, swap_id: str, ids: Sequence[str]) -> dict[str, str]:
    """The versions that a swap has committed, by id; none if it did not come to that, or is not known any more."""
    try:
        told = connection.swap_progress(swap_id)
    except NotFound:
        return {}
    if told["phase"] != "committed":
        return {}
    kept = ((id, entry) for id in ids for entry in connection.history(id))
    return {id: entry["version"] for id, entry in kept if told["epoch"] in entry["epochs"]}


def _wide(tensor: WireTensor) -> Any:
    values = tensor.to_numpy()
    return (bfloat16_to_float32(values) if tensor.dtype == "bfloat16" else values).astype(np.float64)
