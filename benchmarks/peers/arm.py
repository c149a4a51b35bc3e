"""An arm: one way to compute a layer, started and ready to be called."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor


class Arm(AbstractContextManager["Arm"]):
    """Answers rows until it is closed; a context manager.

    Everything that takes time, from processes to a first call, is done when the constructor returns. All calls come
    from one event loop.
    """

    version: str
    """The libraries it stands on, with their versions."""

    @abstractmethod
    async def call(self, x_TD: Tensor) -> Tensor:
        """The rows [T, D] of the layer for the rows `x_TD` [T, D], in the same dtype."""

    @abstractmethod
    def close(self) -> None:
        """End all processes and remove all files of the arm."""

    def __exit__(self, *error: object) -> None:
        self.close()


class ArmUnavailable(Exception):
    """An arm cannot run here, for the reason that the message gives; its rows are left out."""
