"""A member obeys the newest controller alone, and in the order in which it spoke."""

from __future__ import annotations

import pytest

from expertmesh.cluster.control.orders import Order, Orders
from expertmesh.experts.errors import Fenced

OLD, NEW = [Order(1, number) for number in range(9)], [Order(2, number) for number in range(9)]


def test_a_controller_that_was_replaced_is_refused_from_the_first_order_of_the_next() -> None:
    orders = Orders()
    orders.check(OLD[5])
    orders.check(OLD[3])  # late, but of the same controller
    orders.check(NEW[0])
    for order in OLD:
        with pytest.raises(Fenced, match=r"another controller has taken over \(term 2; this order is of 1\)"):
            orders.check(order)
    orders.check(NEW[0])


def test_an_unload_that_a_later_stage_has_overtaken_does_not_count() -> None:
    orders = Orders()
    orders.staged("l/a", "v1", OLD[4])
    orders.staged("l/a", "v1", OLD[2])
    assert not orders.may_unload("l/a", "v1", OLD[3])
    assert orders.may_unload("l/a", "v2", OLD[3])
    assert orders.may_unload("l/b", "v1", OLD[3])
    assert orders.may_unload("l/a", "v1", OLD[5])
    assert orders.may_unload("l/a", "v1", OLD[3])  # it is gone already
    orders.staged("l/a", "v1", OLD[7])
    assert orders.may_unload("l/a", "v1", NEW[0])


def test_an_update_that_was_overtaken_is_old_news() -> None:
    orders = Orders()
    assert orders.is_newest_update(OLD[2])
    assert orders.is_newest_update(OLD[2])
    assert not orders.is_newest_update(OLD[1])
    assert orders.is_newest_update(NEW[0])
    assert not orders.is_newest_update(OLD[8])
