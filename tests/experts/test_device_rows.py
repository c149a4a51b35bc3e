"""Rows on their way to a device and back: on the CPU they stay where they are. CUDA: `live/test_gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
from helpers.router_in_process import load

from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import ExpertCall, Part
from expertmesh.experts.spec import Expert
from expertmesh.experts.sums import device_rows
from expertmesh.experts.sums.device_rows import to_device, to_host_all
from expertmesh.experts.tensors import from_bytes

ROWS = torch.arange(12.0).reshape(3, 4)
KINDS = {
    "contiguous": ROWS,
    "strided": ROWS.t(),
    "empty": ROWS[:0],
    "read-only": from_bytes(bytes(48), "float32", (3, 4)),
    "whole numbers": torch.arange(3),
}


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> NoReturn:
        raise AssertionError("the CPU has no streams")

    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(device_rows, "_pinned_like", refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_the_cpu_are_themselves(kind: str) -> None:
    tensor = KINDS[kind]
    assert to_device(tensor, "cpu") is tensor
    assert to_host_all([tensor])[0] is tensor


def test_several_are_themselves_in_their_order() -> None:
    assert all(here is there for here, there in zip(to_host_all(list(KINDS.values())), KINDS.values(), strict=True))
    assert to_host_all([]) == []


def test_other_devices_get_what_torch_gives_them() -> None:
    assert to_device(ROWS, "meta").is_meta
    assert to_device(ROWS.to("meta"), "meta").is_meta


def test_a_host_on_the_cpu_computes_with_the_memory_of_the_message() -> None:
    read: list[int] = []

    def noting(rows: torch.Tensor) -> torch.Tensor:
        read.append(rows.data_ptr())
        return rows

    host = ExpertHost()
    version = load(host, "e", Expert(live=Uncopied(noting)), 1).version
    read.clear()
    host.compute(ExpertCall(1, (Part("e", version, 0, 1), Part("e", version, 1, 3)), ROWS))
    assert read == [ROWS[0].data_ptr(), ROWS[1].data_ptr()]


class Uncopied:
    """A function that stays the test's own where experts are copied."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.function(rows)

    def __deepcopy__(self, memo: object) -> Uncopied:
        return self
