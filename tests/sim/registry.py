"""A registry whose transaction is one atomic, durable step; only the newest controller may write."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from expertmesh.experts.errors import Fenced


class Registry:
    """Survives every crash. `history` is what the checker compares answers with; nothing is ever taken from it."""

    fenced = True

    def __init__(self, versions: Mapping[str, str]) -> None:
        self.term = 0
        self.epochs: dict[int, Mapping[str, str]] = {1: dict(versions)}
        self.history: dict[int, Mapping[str, str]] = dict(self.epochs)
        self.swaps: dict[str, int] = {}

    @property
    def current(self) -> int:
        """The number of the newest epoch."""
        return max(self.epochs)

    def acquire(self) -> int:
        """Become the only writer."""
        self.term += 1
        return self.term

    def is_writer(self, term: int) -> bool:
        """Whether the controller of this term may still act."""
        return term == self.term or not self.fenced

    def commit(self, term: int, swap_id: str, versions: Mapping[str, str]) -> int:
        """Mint the next epoch; the same swap id again gives the same epoch. Raises Fenced for a former writer."""
        if not self.is_writer(term):
            raise Fenced("another controller has taken over")
        if swap_id not in self.swaps:
            number = self.current + 1
            self.epochs[number] = self.history[number] = {**self.epochs[self.current], **versions}
            self.swaps[swap_id] = number
        return self.swaps[swap_id]

    def collect(self, term: int, kept: Collection[int]) -> None:
        """Forget all epochs but these."""
        if self.is_writer(term):
            self.epochs = {number: versions for number, versions in self.epochs.items() if number in kept}
