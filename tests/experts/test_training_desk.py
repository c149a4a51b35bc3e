"""The desk of a replica: what it cannot do now is told as what may be asked again."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh.experts.protocol import TrainCall
from expertmesh.experts.training.desk import TrainingDesk, as_tensor


@pytest.mark.parametrize("operation", ["open", "copy"])
def test_a_process_that_has_just_begun_has_no_version_yet(operation: str) -> None:
    desk = TrainingDesk(lambda expert, version: None, "cpu")
    meta: dict[str, Any] = {"op": operation, "session": "s", "step": 1, "parts": [["l/e0", "v1", 0, 0, 0]]}
    (outcome,) = desk.answer(TrainCall(1, meta, {"data": as_tensor(b"")})).outcomes
    assert outcome["error"] == "VersionGone"
