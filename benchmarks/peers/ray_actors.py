"""Plain Ray actors, with the gate and the combination in the driver: naive, and as good as calls of actors can be.

Naive Ray is what one writes first: an actor per expert, torch tensors as arguments. Good Ray is what a user who knows
Ray well writes: one call per actor and batch, rows sorted by expert once, numpy views of their bytes (which Ray carries
without a copy, bf16 too), all calls issued before any is awaited. Measured: views are as fast as torch tensors under
RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1 or faster, and awaiting the answers as fast as `ray.get`, in a thread or not.

Shapes: T rows, D features, E experts, K choices, N pairs of a row and an expert, R rows at an actor.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.router.mixture.combine import combine
from expertmesh.router.mixture.dispatch import dispatch

from .arm import Arm
from .model import Shape, expert, gate
from .private_ray import private_ray

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class RayArm(Arm):
    """Actors on the private Ray, one for each of `arguments`, which are ready; they end with the arm."""

    def __init__(self, actor: type, arguments: Iterable[tuple[Any, ...]]) -> None:
        self._actors: list[Any] = []
        with ExitStack() as stack:
            ray = stack.enter_context(private_ray())
            stack.callback(lambda: [ray.kill(actor) for actor in self._actors])
            remote = ray.remote(actor).options(num_cpus=0)
            self._actors += [remote.remote(*given) for given in arguments]
            ray.get([actor.__ray_ready__.remote() for actor in self._actors])
            self.version = f"ray {ray.__version__}, torch {torch.__version__}, {len(self._actors)} actors"
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


class ExpertActor:
    """One expert."""

    def __init__(self, shape: Shape, index: int, dtype: torch.dtype) -> None:
        torch.set_num_threads(1)
        self._expert = expert(shape, index, dtype)

    @torch.inference_mode()
    def forward(self, x_RD: Tensor) -> Tensor:
        """Its rows."""
        return self._expert(x_RD)  # type: ignore[no-any-return]


class RayNaive(RayArm):
    """One call per expert and batch, in Ray's default serialisation of tensors."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._gate = gate(shape)
        super().__init__(ExpertActor, [(shape, index, dtype) for index in range(shape.experts)])

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


class PackActor:
    """Consecutive experts of a layer."""

    def __init__(self, shape: Shape, indices: range, dtype: torch.dtype) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._experts = [expert(shape, index, dtype) for index in indices]
        self._width, self._dtype = shape.width, dtype

    @torch.inference_mode()
    def forward(self, rows: Bytes, counts: Sequence[int]) -> Bytes:
        """Rows sorted by expert, `counts` of them for each; their answers in the same order."""
        parts = torch.split(to_rows(rows, self._dtype, self._width), list(counts))
        answers = [module(part_RD) for module, part_RD in zip(self._experts, parts, strict=True) if len(part_RD)]
        return to_bytes(torch.cat(answers) if len(answers) > 1 else answers[0])


class RayGood(RayArm):
    """The experts on `actors` actors; by default each has one of its own."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, actors: int | None = None) -> None:
        self._shape = shape
        self._gate = gate(shape)
        self._packs = packs(shape.experts, actors or shape.experts)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        super().__init__(PackActor, [(shape, indices, dtype) for indices in self._packs])

    async def call(self, x_TD: Tensor) -> Tensor:
        with torch.inference_mode():
            handle = dispatch(self._gate(x_TD), self._shape.experts)
            rows = to_bytes(x_TD.index_select(0, handle.rows_N)).reshape(handle.num_pairs, -1)
        answers = []
        for indices, actor in zip(self._packs, self._actors, strict=True):
            offsets = handle.offsets[indices.start : indices.stop + 1]
            if offsets[0] < offsets[-1]:
                counts = [stop - start for start, stop in itertools.pairwise(offsets)]
                answers.append(actor.forward.remote(rows[offsets[0] : offsets[-1]].reshape(-1), counts))
        parts = [to_rows(answer, x_TD.dtype, self._shape.width) for answer in await asyncio.gather(*answers)]
        with torch.inference_mode():
            return combine(handle, torch.cat(parts)).output


def packs(experts: int, actors: int) -> list[range]:
    """Experts in `actors` consecutive runs of nearly equal length."""
    bounds = [experts * place // actors for place in range(actors + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def to_bytes(rows_RD: Tensor) -> Bytes:
    """A flat view of the bytes of rows."""
    return rows_RD.view(torch.uint8).numpy().reshape(-1)


def to_rows(array: Bytes, dtype: torch.dtype, width: int) -> Tensor:
    """The rows whose bytes these are, without a copy."""
    return torch.from_numpy(array).view(dtype).view(-1, width)
