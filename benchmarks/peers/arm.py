"""An arm: one way to compute a layer, started and ready to be called."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="Arm")


class Arm(Protocol):
    """Answers rows until it is closed; a context manager.

    Everything that takes time, from processes to a first call, is done when the constructor returns. All calls come
    from one event loop.
    """

    name: str
    """What the arm is called on the command line."""

    version: str
    """The libraries it stands on, with their versions."""

    async def call(self, x_TD: Tensor) -> Tensor:
        """The rows [T, D] of the layer for the rows `x_TD` [T, D], in the same dtype."""
        ...

    def close(self) -> None:
        """End all processes and remove all files of the arm."""
        ...

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArmUnavailable(Exception):
    """An arm cannot run here, for the reason that the message gives; its rows are left out."""
