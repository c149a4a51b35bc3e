"""A queue in which clients take turns, so that one that sends much does not keep others waiting. A pure decision."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of one client come in order of arrival, one of each client at a time."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self._clients.values())

    def put(self, client: str, item: T) -> None:
        """Add an item to those of a client."""
        self._clients.setdefault(client, deque()).append(item)

    def peek(self) -> T | None:
        """The item whose turn it is, or None."""
        client = next(iter(self._clients), None)
        return None if client is None else self._clients[client][0]

    def pop(self) -> T:
        """Take the item whose turn it is; its client goes behind the others. Raises IndexError for an empty queue."""
        client = next(iter(self._clients), None)
        if client is None:
            raise IndexError("the queue is empty")
        items = self._clients.pop(client)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def items(self) -> list[T]:
        """Everything that waits, in no order that matters; safe to call from another thread."""
        return [item for items in list(self._clients.values()) for item in list(items)]

    def drain(self) -> list[T]:
        """Take everything, in turns."""
        return [self.pop() for _ in range(len(self))]
