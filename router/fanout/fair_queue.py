"""A queue in which clients take turns, so that a busy client does not delay the others. Pure logic, no I/O."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Takes one item of each client in turn; the items of a client come in order of arrival."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self._clients.values())

    def put(self, client: str, item: T) -> None:
        """Add an item of a client."""
        self._clients.setdefault(client, deque()).append(item)

    def peek(self) -> T | None:
        """The next item, or None."""
        client = next(iter(self._clients), None)
        return None if client is None else self._clients[client][0]

    def pop(self) -> T:
        """Take the next item; its client moves behind the others. Raises IndexError if the queue is empty."""
        client = next(iter(self._clients), None)
        if client is None:
            raise IndexError("the queue is empty")
        items = self._clients.pop(client)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def items(self) -> list[T]:
        """The waiting items, in no particular order; safe to call from another thread."""
        return [item for items in list(self._clients.values()) for item in list(items)]

    def drain(self) -> list[T]:
        """Take all items, in turns."""
        return [self.pop() for _ in range(len(self))]
