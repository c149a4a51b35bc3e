"""The limit: our own layer in the process that asks, without any message.

Experts are computed packed or one by one, on each number of threads, whichever is the fastest for that many rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.router.mixture.local import LocalLayer

from .arm import Arm
from .model import Shape, expert, gate, packed, reference

ROUNDS = 7
THREADS = (1, 2)


@dataclass(frozen=True)
class Form:
    """One way to compute the layer."""

    layer: Callable[[Tensor], Tensor]
    threads: int

    def __call__(self, x_TD: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.layer(x_TD)
        finally:
            torch.set_num_threads(before)  # other arms of this process have one thread


class InProcess(Arm):
    """`LocalLayer`, in the best form for each number of rows: found by a short measurement at the first call."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._forms = [Form(layer, threads) for layer in self._layers(shape, dtype) for threads in THREADS]
        self.chosen: dict[int, Form] = {}
        self.version = f"torch {torch.__version__}"

    def _layers(self, shape: Shape, dtype: torch.dtype) -> Sequence[Callable[[Tensor], Tensor]]:
        """The ways to compute it: experts packed, and one by one."""
        return LocalLayer(gate(shape), packed(shape, dtype)).eval(), reference(shape, dtype)

    async def call(self, x_TD: Tensor) -> Tensor:
        with torch.inference_mode():
            form = self.chosen.get(x_TD.shape[0])
            if form is None:
                form = self.chosen[x_TD.shape[0]] = fastest(self._forms, x_TD)
            return form(x_TD)

    def close(self) -> None:
        self._forms.clear()
        self.chosen.clear()


class OneExpertInProcess(InProcess):
    """The first expert alone: what its computation takes, with no message and no gate."""

    expert = 0

    def _layers(self, shape: Shape, dtype: torch.dtype) -> Sequence[Callable[[Tensor], Tensor]]:
        return (expert(shape, 0, dtype),)


def fastest(forms: Sequence[Form], x_TD: Tensor) -> Form:
    """The form with the least median time for these rows, over rounds that interleave all forms."""
    times: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(1 + ROUNDS):
        for form in forms:
            begin = time.perf_counter()
            form(x_TD)
            times[form].append(time.perf_counter() - begin)
    return min(forms, key=lambda form: statistics.median(times[form][1:]))  # the first one warms up
