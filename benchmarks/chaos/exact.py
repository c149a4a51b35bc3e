"""The layer that is experimented on, and its arithmetic once more in whole numbers, without torch or the router.

Rows have `CLASSES` columns of which exactly one is 1 and picks two experts, `FREE` columns of whole numbers, and a zero
for the gate's stamp. The gate scores those two experts 9, on purpose the same, so that the softmax over both is exactly
1/2 and 1/2, and every other at least 3 lower. So each answer is a half of a whole number below 2^24: exact in fp32 in
any order of sums, and two answers are the same only if they have the same bits.

Shapes: T rows, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CLASSES = 32
FREE = 15
WIDTH = CLASSES + FREE + 1
LARGEST = 4
CHOSEN_SCORE = 9

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]
"""The tensors of one version by name: `weight` and `stamp` of an expert, `weight` of a gate."""


@dataclass(frozen=True)
class Shape:
    """How many experts the layer has, and its name."""

    experts: int = 8
    layer: str = "chaos"

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """The ids of the experts, in the gate's order."""
        return tuple(f"{self.layer}/e{place}" for place in range(self.experts))

    @property
    def gate_id(self) -> str:
        """The id of the gate."""
        return f"{self.layer}/gate"

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all, the gate last."""
        return (*self.expert_ids, self.gate_id)


@dataclass
class Maker:
    """Makes the tensors of version after version, each with a stamp that no other version of this run has."""

    shape: Shape
    seed: int = 0
    _next: Iterator[int] = field(default_factory=lambda: iter(range(1000, 1 << 20)))

    def tensors(self, id: str) -> dict[str, Array]:
        """The tensors of a new version of an expert or of the gate."""
        stamp = next(self._next)
        random = np.random.default_rng([self.seed, stamp])
        if id == self.shape.gate_id:
            return {"weight": _table(random, self.shape.experts, stamp)}
        stamps = np.zeros(self.shape.experts, np.float32)
        stamps[self.shape.expert_ids.index(id)] = stamp
        weight = random.integers(-LARGEST, LARGEST + 1, (WIDTH, WIDTH))
        return {"weight": weight.astype(np.float32), "stamp": stamps}


def _table(random: np.random.Generator, experts: int, stamp: int) -> Array:
    """The weight [E, D] of a gate: for each class a column with two 9s, elsewhere whole numbers up to 6."""
    weight = np.zeros((experts, WIDTH), np.float32)
    weight[:, :CLASSES] = random.integers(1, 7, (experts, CLASSES))
    for column in range(CLASSES):
        weight[random.choice(experts, 2, replace=False), column] = CHOSEN_SCORE
    weight[:, -1] = stamp
    return weight


def rows(number: int, count: int) -> Array:
    """The rows [T, D] of a request, the same for the same number."""
    random = np.random.default_rng([7, number])
    x = np.zeros((count, WIDTH), np.float32)
    x[np.arange(count), random.integers(0, CLASSES, count)] = 1
    x[:, CLASSES:-1] = random.integers(-8, 9, (count, FREE))
    return x


def chosen(gate: Tensors, x: Array) -> Array:
    """Which experts the gate picks for each row: bool [T, E]."""
    scores_TE = x.astype(np.int64) @ gate["weight"].astype(np.int64).T
    chosen_TE: Array = scores_TE == scores_TE.max(axis=1, keepdims=True)
    return chosen_TE


def answer(x: Array, chosen_TE: Array, experts: Mapping[int, Tensors]) -> Array:
    """What the layer has to answer to `x`, float32 [T, D + E]; `experts` by their place."""
    whole = x.astype(np.int64)
    total = np.zeros((len(x), WIDTH + chosen_TE.shape[1]), np.int64)
    for place, tensors in experts.items():
        mine = chosen_TE[:, place]
        total[mine, :WIDTH] += whole[mine] @ tensors["weight"].astype(np.int64).T
        total[mine, WIDTH:] += tensors["stamp"].astype(np.int64)
    return (total / 2).astype(np.float32)
