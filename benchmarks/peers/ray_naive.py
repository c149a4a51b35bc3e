"""Naive Ray: what one writes first. An actor per expert, torch tensors as arguments, the driver gates and combines.

Shapes: T rows, D features, E experts, K choices, R rows at an expert.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import torch
from torch import Tensor

from .arm import Arm
from .model import Shape, expert, gate
from .private_ray import private_ray


class ExpertActor:
    """One expert."""

    def __init__(self, shape: Shape, index: int, dtype: torch.dtype) -> None:
        torch.set_num_threads(1)
        self._expert = expert(shape, index, dtype)

    @torch.inference_mode()
    def forward(self, x_RD: Tensor) -> Tensor:
        """Its rows."""
        return self._expert(x_RD)  # type: ignore[no-any-return]


class RayNaive(Arm):
    """One call per expert and batch, in Ray's default serialisation of tensors."""

    name = "ray_naive"

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._gate = gate(shape)
        with ExitStack() as stack:
            ray = stack.enter_context(private_ray())
            stack.callback(self._kill, ray)
            self.version = f"ray {ray.__version__}, torch {torch.__version__}"
            actor = ray.remote(ExpertActor).options(num_cpus=0)
            self._actors = [actor.remote(shape, index, dtype) for index in range(shape.experts)]
            ray.get([actor.__ray_ready__.remote() for actor in self._actors])
            self._stack = stack.pop_all()

    async def call(self, x_TD: Tensor) -> Tensor:
        routing = self._gate(x_TD)
        chosen, answers = [], []
        for index, actor in enumerate(self._actors):
            rows_R, choices_R = (routing.indices_TK == index).nonzero(as_tuple=True)
            if rows_R.numel():
                chosen.append((rows_R, routing.weights_TK[rows_R, choices_R]))
                answers.append(actor.forward.remote(x_TD[rows_R]))
        sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        for (rows_R, weights_R), answer_RD in zip(chosen, await asyncio.gather(*answers), strict=True):
            sum_TD.index_add_(0, rows_R, weights_R[:, None] * answer_RD.float())
        return sum_TD.to(x_TD.dtype)

    def close(self) -> None:
        self._stack.close()

    def _kill(self, ray: object) -> None:
        for actor in getattr(self, "_actors", ()):
            ray.kill(actor)  # type: ignore[attr-defined]
