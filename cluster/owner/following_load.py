"""The owner starts and ends replicas as the controller decides by the load."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from ...experts.errors import ExpertMeshError

log = logging.getLogger(__name__)


class FollowsLoad:
    """Scales what is asked for, one call after another, in a thread of its own.

    A decision is carried out once: where that fails, the controller makes another one. `scale` takes numbers of
    replicas by expert or pack.
    """

    def __init__(self, scale: Callable[[Mapping[str, int]], object]) -> None:
        self._scale = scale
        self._followed: dict[str, str] = {}
        self._thread: threading.Thread | None = None

    def follow(self, asked: Mapping[str, tuple[str, int]]) -> None:
        """Begin what was not begun yet, unless a call is under way. `asked` has decisions, by id, and numbers."""
        if self._thread is not None and self._thread.is_alive():
            return
        new = {group: number for group, (decision, number) in asked.items() if self._followed.get(group) != decision}
        if new:
            self._followed |= {group: asked[group][0] for group in new}
            self._thread = threading.Thread(target=self._carry_out, args=(new,), name="autoscale", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the call that is under way."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _carry_out(self, numbers: Mapping[str, int]) -> None:
        try:
            self._scale(numbers)
        except ExpertMeshError as error:
            log.warning("autoscale: %s", error)
        else:
            log.info("autoscale: %s", ", ".join(f"{group} has {number} replicas" for group, number in numbers.items()))
