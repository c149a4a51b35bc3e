"""A layer whose experts come and go: every answer is recomputed from the versions that it names.

Each expert multiplies by a whole number and the gate takes all of them, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from helpers.calling import Callers

from expertmesh import Client, Expert, Layer, Reply, TensorSpec, Unavailable, gates

X = np.array([[1.0, 2.0, 4.0]], np.float32)
ROWS = TensorSpec((3,), "float32")
GATE = "l/gate"


def expert(by: int, **options: Any) -> Expert:
    """An expert that multiplies by a number: the polynomial by * x + 0."""
    return Expert("numpy:poly1d", args=([float(by), 0.0],), framework="numpy", **options)


def layer(factors: Mapping[str, int], **options: Any) -> Layer:
    """A layer with these factors by name, and a gate whose weights are 1, 2, 3, ...; `options` are of its experts."""
    experts = {name: expert(by, **options) for name, by in factors.items()}
    return Layer("l", gate(len(factors)), experts, input=ROWS)


def gate(count: int, first: int = 1) -> gates.Fixed:
    """The weights first, first + 1, ..."""
    return gates.Fixed([float(number) for number in range(first, first + count)])


class Ledger:
    """What each version is."""

    def __init__(self) -> None:
        self.factors: dict[tuple[str, str], int] = {}
        self.gates: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {}

    def knows(self, versions: Mapping[str, str], factors: Mapping[str, int], weights: gates.Fixed) -> None:
        """Take the versions that serve where a layer has these factors, in this order, and this gate."""
        self.gates[versions[GATE]] = (tuple(factors), tuple(weights.config()["weights"]))
        self.factors |= {(f"l/{name}", versions[f"l/{name}"]): by for name, by in factors.items()}

    def wrong(self, x: Any, reply: Reply) -> str:
        """What is wrong with an answer: it names other versions than its gate has experts, or is another sum."""
        names, weights = self.gates[reply.versions[GATE]]
        if reply.versions.keys() != {GATE, *(f"l/{name}" for name in names)}:
            return f"the experts of {reply.versions[GATE]} are {names}, and the answer names {sorted(reply.versions)}"
        factors = [self.factors[f"l/{name}", reply.versions[f"l/{name}"]] for name in names]
        total = sum(weight * factor for weight, factor in zip(weights, factors, strict=True))
        return "" if np.array_equal(reply.output, total * x) else f"{reply.output} is not {total} times {x}"


class Recomputed(Callers):
    """Callers of layer l; afterwards every answer is looked at. What is Unavailable is counted apart."""

    def __init__(self, client: Client, ledger: Ledger) -> None:
        super().__init__(self._ask)
        self.answers: list[tuple[Any, Reply]] = []
        self.unavailable = 0
        self._client = client
        self._ledger = ledger

    def _ask(self, number: int) -> bool:
        x = X * (number + 1)
        try:
            self.answers.append((x, self._client.call("l", x)))
        except Unavailable:
            self.unavailable += 1
            return False
        return True

    def problems(self) -> list[str]:
        """What failed, and what is wrong with the answers."""
        found = [self._ledger.wrong(x, reply) for x, reply in self.answers]
        return [*map(repr, self.failed), *filter(None, found)]
