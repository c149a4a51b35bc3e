"""The checker: recomputes every answer from the versions that its reply names, and holds those against the epochs.

It trusts nothing of the cluster but what was acknowledged: which file became which version, and which epochs exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertmesh import Reply

from .exact import Shape, Tensors, answer, chosen

RIGHT, WRONG, MIXED, UNKNOWN = "right", "wrong", "mixed", "unknown"
"""An answer is as it must be; differs in a bit; names versions of several epochs; names what nobody acknowledged."""


@dataclass
class Ledger:
    """What was acknowledged: the epochs, each a whole map {id: version}, and the tensors of each version."""

    epochs: dict[int, dict[str, str]] = field(default_factory=dict)
    tensors: dict[tuple[str, str], Tensors] = field(default_factory=dict)

    def begin(self, epoch: int, versions: Mapping[str, str], tensors: Mapping[str, Tensors]) -> None:
        """The epoch that a run begins with."""
        self.epochs[epoch] = dict(versions)
        self.tensors |= {(id, versions[id]): value for id, value in tensors.items()}

    def committed(self, epoch: int, after: Mapping[str, str], tensors: Mapping[str, Tensors]) -> None:
        """A swap that was acknowledged. Raises ValueError for one that contradicts an earlier acknowledgement."""
        if epoch in self.epochs and any(self.epochs[epoch].get(id) != version for id, version in after.items()):
            raise ValueError(f"epoch {epoch} was acknowledged twice, with different versions")
        older = [number for number in self.epochs if number < epoch]
        if epoch not in self.epochs and not older:
            raise ValueError(f"epoch {epoch} is older than every epoch that is known")
        if epoch not in self.epochs:
            self.epochs[epoch] = {**self.epochs[max(older)], **after}
        for id, value in tensors.items():
            known = self.tensors.setdefault((id, after[id]), value)
            if any(not np.array_equal(known[name], value[name]) for name in value):
                raise ValueError(f"{id} {after[id]} was acknowledged for two different files")

    @property
    def current(self) -> dict[str, str]:
        """The versions of the newest epoch."""
        return self.epochs[max(self.epochs)]


@dataclass
class Checker:
    """Judges replies by a ledger, and counts the verdicts; `examples` says more about the first that are not right."""

    shape: Shape
    ledger: Ledger
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def judge(self, x: Any, reply: Reply) -> str:
        """The verdict on one reply to the rows `x` [T, D]."""
        verdict, why = self._verdict(x, reply)
        self.counts[verdict] += 1
        if verdict != RIGHT and len(self.examples) < 5:
            self.examples.append(f"{verdict}: epoch {reply.epoch}: {why}")
        return verdict

    def _verdict(self, x: Any, reply: Reply) -> tuple[str, str]:
        epoch = self.ledger.epochs.get(reply.epoch)
        if epoch is None:
            return UNKNOWN, "this epoch was never acknowledged"
        for id, version in reply.versions.items():
            if (id, version) not in self.ledger.tensors:
                return UNKNOWN, f"{id} {version} was never acknowledged"
        for id, version in reply.versions.items():
            if epoch.get(id) != version:
                return MIXED, f"{id} is named as {version}, the epoch has {epoch.get(id)}"
        return self._recomputed(x, reply)

    def _recomputed(self, x: Any, reply: Reply) -> tuple[str, str]:
        shape, tensors = self.shape, self.ledger.tensors
        if reply.degraded or shape.gate_id not in reply.versions:
            return WRONG, f"degraded, or without its gate: {sorted(reply.versions)}"
        chosen_TE = chosen(tensors[shape.gate_id, reply.versions[shape.gate_id]], x)
        places = {place: shape.expert_ids[place] for place in np.flatnonzero(chosen_TE.any(axis=0)).tolist()}
        if {*places.values(), shape.gate_id} != set(reply.versions):
            return WRONG, f"its gate picks {sorted(places.values())}, the reply names {sorted(reply.versions)}"
        experts = {place: tensors[id, reply.versions[id]] for place, id in places.items()}
        if not _same_bits(answer(x, chosen_TE, experts), reply.output):
            return WRONG, f"the output is not that of {reply.versions}"
        return RIGHT, ""


def _same_bits(wanted: Any, given: Any) -> bool:
    given = np.asarray(given)
    if given.dtype != np.float32 or given.shape != wanted.shape:
        return False
    return bool(np.array_equal((wanted + 0.0).view(np.uint32), (given + 0.0).view(np.uint32)))
