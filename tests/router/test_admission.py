"""Admission: rows never exceed the limits, all rows are released, and no layer starves the others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.experts.errors import Overloaded, TooLarge
from expertmesh.router.request.admission import Admission


class Admitting(RuleBasedStateMachine):
    @initialize(max_rows=st.integers(1, 40))
    def start(self, max_rows: int) -> None:
        self.admission = Admission(max_rows)
        self.limit = max(1, int(max_rows * 0.75))
        self.held: list[tuple[str, int, AbstractContextManager[None]]] = []

    def rows(self, layer: str | None = None) -> int:
        return sum(rows for name, rows, _ in self.held if layer in (None, name))

    @rule(layer=st.sampled_from("abc"), rows=st.integers(0, 45))
    def admit(self, layer: str, rows: int) -> None:
        counted = max(1, rows)
        admitted = self.admission.admit(layer, rows)
        fits = self.rows(layer) + counted <= self.limit and self.rows() + counted <= self.admission.max_rows
        if counted > self.limit:
            with pytest.raises(TooLarge, match="max_rows_in_flight"):
                admitted.__enter__()
        elif not fits:
            with pytest.raises(Overloaded) as caught:
                admitted.__enter__()
            assert caught.value.retry_after > 0
        else:
            admitted.__enter__()
            self.held.append((layer, counted, admitted))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), fails=st.booleans())
    def release(self, data: Any, fails: bool) -> None:
        _, _, admitted = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        arguments = (ValueError, ValueError("the request failed"), None) if fails else (None, None, None)
        assert not admitted.__exit__(*arguments)  # an error propagates to the caller

    @invariant()
    def the_count_is_right(self) -> None:
        if not hasattr(self, "held"):
            return
        assert self.admission.rows == self.rows() <= self.admission.max_rows
        assert self.admission.by_layer() == {name: self.rows(name) for name, _, _ in self.held}


TestAdmitting = Admitting.TestCase
TestAdmitting.settings = settings(max_examples=60, deadline=None)


@given(max_rows=st.integers(4, 100_000))
@settings(max_examples=30)
def test_a_full_layer_leaves_room_for_others(max_rows: int) -> None:
    admission = Admission(max_rows)
    with admission.admit("slow", int(max_rows * 0.75)):
        with pytest.raises(Overloaded, match="in layer slow"), admission.admit("slow", 1):
            pass
        with admission.admit("other", 1):
            assert admission.by_layer()["other"] == 1
    assert (admission.rows, admission.by_layer()) == (0, {})
