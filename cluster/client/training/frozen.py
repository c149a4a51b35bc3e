"""Passes through the experts that serve: gradients of rows and weights, while the experts learn nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ....experts.errors import ExpertMeshError, Unavailable, VersionGone
from ....experts.wire import WireTensor
from ...rpc.training import error_of
from .delivery import LEFT_OUT, Connection, pauses_of
from .options import PATIENCE, Passed
from .updates import Part


class ServingPasses:
    """Forward and backward passes of one layer, of the versions that serve; each backward pass uses those of its own.

    With `on_missing` "leave_out" an expert that does not answer is left out, otherwise its error is raised.
    """

    def __init__(self, connection: Connection, layer: str, on_missing: str = "error") -> None:
        self._connection = connection
        self._layer = layer
        self._on_missing = on_missing

    def describe(self) -> dict[str, Any]:
        """The layer: "experts" and "shared" in the order of the gate, "combine", "on_dropped", "versions", "epoch"."""
        return self._connection._training("Pass", {"op": "versions", "layer": self._layer}, {}).meta

    def forward(self, parts: Sequence[Part], tensors: dict[str, WireTensor]) -> tuple[Passed, dict[str, str]]:
        """A forward pass, and the versions that computed it. Raises the error of an expert, unless it is left out."""
        return self._ask("forward", parts, tensors)

    def backward(self, parts: Sequence[Part], tensors: dict[str, WireTensor]) -> Passed:
        """The backward pass through the versions that the parts name. Raises VersionGone where one serves no more."""
        return self._ask("backward", parts, tensors)[0]

    def _ask(
        self, operation: str, parts: Sequence[Part], tensors: dict[str, WireTensor]
    ) -> tuple[Passed, dict[str, str]]:
        meta = {"op": operation, "layer": self._layer, "parts": [list(part) for part in parts]}
        pauses = pauses_of(PATIENCE[self._on_missing])
        while True:
            frame = self._connection._training("Pass", meta, tensors)
            outcomes = [dict(outcome) for outcome in frame.meta["outcomes"]]
            errors: dict[str, ExpertMeshError] = {
                part[0]: error_of(outcome) for part, outcome in zip(parts, outcomes, strict=True) if "error" in outcome
            }
            passing = (Unavailable, VersionGone) if operation == "forward" else Unavailable
            lost = any(isinstance(error, passing) for error in errors.values())
            if lost and (pause := next(pauses, None)) is not None:
                time.sleep(pause)
                continue
            for error in errors.values():
                if self._on_missing != "leave_out" or not isinstance(error, LEFT_OUT):
                    raise error
            return Passed(frame.tensors, errors), dict(frame.meta["versions"])
