"""Epochs: only newer ones are adopted, and an old one stays known until its last pin is released."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.experts.errors import Unavailable
from expertmesh.router.epochs.epochs import Epoch, Epochs


def test_before_the_first_epoch_nothing_can_be_pinned() -> None:
    epochs = Epochs()
    assert (epochs.number, epochs.oldest_pinned(), epochs.pins()) == (0, 0, {})
    with pytest.raises(Unavailable, match="has not received its layers yet"):
        epochs.pin()


class Pinning(RuleBasedStateMachine):
    @initialize(number=st.integers(1, 3))
    def start(self, number: int) -> None:
        self.epochs = Epochs()
        assert self.epochs.adopt(Epoch(number))
        self.current = number
        self.held: list[Epoch] = []

    @rule(number=st.integers(0, 12))
    def adopt(self, number: int) -> None:
        epoch = Epoch(number, {"l/e": f"v{number}"})
        assert self.epochs.adopt(epoch) == (number > self.current)
        self.current = max(self.current, number)

    @rule()
    def pin(self) -> None:
        epoch = self.epochs.pin()
        assert epoch is self.epochs.current
        assert epoch.number == self.current
        self.held.append(epoch)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data: Any) -> None:
        self.epochs.unpin(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def pins_are_counted(self) -> None:
        if not hasattr(self, "held"):
            return
        numbers = [epoch.number for epoch in self.held]
        assert self.epochs.pins() == {number: numbers.count(number) for number in set(numbers)}
        assert self.epochs.oldest_pinned() == min([*numbers, self.current] if numbers else [self.current])
        assert self.epochs.number == self.current


TestPinning = Pinning.TestCase
TestPinning.settings = settings(max_examples=40, deadline=None)


def test_a_pin_that_does_not_exist_cannot_be_released() -> None:
    epochs = Epochs()
    epochs.adopt(Epoch(1))
    with pytest.raises(KeyError):
        epochs.unpin(Epoch(1))
