"""The updates of a session that are not durable yet, as its client keeps them, to repeat those that are lost. Pure.

An expert whose process was replaced goes back to the durable step; what it had learned since is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ....experts.training.ledger import chain

Message = tuple[dict[str, Any], dict[str, Any]]
"""The fields of a request, without its parts, and its tensors by name."""

Part = tuple[str, str, int, int, int]
"""(expert, version, start, stop, number)."""


@dataclass(frozen=True)
class Update:
    """A backward pass (`closes` False) or an update of `step`, and its parts by expert."""

    step: int
    message: Message
    parts: Mapping[str, Part]
    closes: bool

    @property
    def nbytes(self) -> int:
        """The size of its tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.message[1].values())


@dataclass
class Updates:
    """Updates in the order in which they were made, all of them after the durable step."""

    _kept: list[Update] = field(default_factory=list)

    def add(self, step: int, message: Message, parts: Sequence[Part], *, closes: bool) -> None:
        """Keep an update, or a backward pass, with a copy of its tensors: the caller may change them."""
        meta, tensors = message
        message = meta, {name: replace(tensor, data=bytes(tensor.data)) for name, tensor in tensors.items()}
        self._kept.append(Update(step, message, {part[0]: part for part in parts}, closes))

    def after(self, expert: str, applied: int, passes: int) -> list[Update]:
        """What an expert lacks that has applied so many steps, and so many backward passes of the next one."""
        lacking = []
        for update in self._kept:
            part = update.parts.get(expert)
            if part is None or update.step <= applied:
                continue
            if update.closes or update.step > applied + 1 or part[4] >= passes:
                lacking.append(update)
        return lacking

    def passes(self, expert: str, step: int) -> int:
        """How many backward passes of a step an expert has, by what is kept."""
        return len(self._passes_of(expert, step))

    def chain(self, expert: str, step: int) -> int:
        """The chain of the seeds of these passes, by which the expert tells that it has the same ones."""
        return chain(update.message[0]["seed"] for update in self._passes_of(expert, step))

    def _passes_of(self, expert: str, step: int) -> list[Update]:
        return [update for update in self._kept if update.step == step and not update.closes and expert in update.parts]

    def forget_passes(self, step: int) -> None:
        """Drop the backward passes of a step that is not made."""
        self._kept = [update for update in self._kept if update.step != step]

    def durable(self, step: int) -> None:
        """Drop what is durable."""
        self._kept = [update for update in self._kept if update.step > step]

    @property
    def nbytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(update.nbytes for update in self._kept)
