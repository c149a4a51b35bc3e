"""Admission: how many rows may be in flight at once, in all and per layer, and early refusal above that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...experts.errors import Overloaded, TooLarge


class Admission:
    """Counts the rows of admitted requests.

    `max_rows` bounds all layers together. A layer may use at most three quarters of it, so that one slow layer cannot
    starve the others; a layer that is alone loses little by that.
    """

    LAYER_SHARE = 0.75

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = 0
        self._by_layer: dict[str, int] = {}

    @contextmanager
    def admit(self, layer: str, rows: int) -> Iterator[None]:
        """Hold `rows` for a request of `layer`; a request without rows counts as one.

        Raises TooLarge for a request that can never fit, Overloaded where it does not fit now.
        """
        rows = max(1, rows)
        layer_limit = max(1, int(self.max_rows * self.LAYER_SHARE))
        held = self._by_layer.get(layer, 0)
        if rows > layer_limit:
            raise TooLarge(f"the request has {rows} rows; at most {layer_limit} fit (max_rows_in_flight): split it")
        if held + rows > layer_limit or self.rows + rows > self.max_rows:
            raise Overloaded(f"{held} rows are in flight in layer {layer}, {self.rows} in all; retry later")
        self._by_layer[layer] = held + rows
        self.rows += rows
        try:
            yield
        finally:
            self.rows -= rows
            self._by_layer[layer] -= rows
            if not self._by_layer[layer]:
                del self._by_layer[layer]

    def by_layer(self) -> dict[str, int]:
        """Rows in flight of each layer that has any."""
        return dict(self._by_layer)
