"""Admission: limits the rows in flight, in total and per layer, and rejects requests above the limit early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...experts.errors import Overloaded, TooLarge


class Admission:
    """Counts the rows of admitted requests.

    `max_rows` limits all layers together. One layer may use at most three quarters of it, so that a slow layer cannot
    starve the others; this costs a cluster with a single layer little.
    """

    LAYER_SHARE = 0.75

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = 0
        self._by_layer: dict[str, int] = {}

    @contextmanager
    def admit(self, layer: str, rows: int) -> Iterator[None]:
        """Hold `rows` for a request of `layer`; a request without rows counts as one row.

        Raises TooLarge for a request that can never fit, Overloaded for one that does not fit now.
        """
        rows = max(1, rows)
        layer_limit = max(1, int(self.max_rows * self.LAYER_SHARE))
        held = self._by_layer.get(layer, 0)
        if rows > layer_limit:
            raise TooLarge(
                f"the request has {rows} rows, but max_rows_in_flight leaves room for {layer_limit} per layer: split it"
            )
        if held + rows > layer_limit or self.rows + rows > self.max_rows:
            raise Overloaded(f"too many rows in flight: {held} in layer {layer}, {self.rows} in all; retry later")
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
        """The rows in flight of each layer that has any."""
        return dict(self._by_layer)
