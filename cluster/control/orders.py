"""Who is obeyed: a member follows the newest controller alone, and each controller in the order in which it spoke."""

from __future__ import annotations

from dataclasses import dataclass

from ...experts.errors import Fenced


@dataclass(frozen=True, order=True)
class Order:
    """The place of an order: the term of the controller that gave it, and its number among those of that controller."""

    term: int = 0
    number: int = 0


class Orders:
    """What a member remembers of the orders that it was given."""

    def __init__(self) -> None:
        self._term = 0
        self._update = Order()
        self._staged: dict[tuple[str, str], Order] = {}

    def check(self, order: Order) -> None:
        """Raise Fenced for an order of a controller that another one has replaced, as far as is known here."""
        if order.term < self._term:
            raise Fenced(f"another controller has taken over (term {self._term}; this order is of {order.term})")
        self._term = order.term

    def staged(self, id: str, version: str, order: Order) -> None:
        """A version was staged or loaded on this order."""
        self._staged[id, version] = max(order, self._staged.get((id, version), order))

    def may_unload(self, id: str, version: str, order: Order) -> bool:
        """Whether an order to unload a version still counts: not if the version was staged on a later one."""
        if order < self._staged.get((id, version), order):
            return False
        self._staged.pop((id, version), None)
        return True

    def is_newest_update(self, order: Order) -> bool:
        """Whether an update was sent after all that came before it; one that was overtaken on its way is old news."""
        if order < self._update:
            return False
        self._update = order
        return True
