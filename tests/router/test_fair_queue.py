"""Clients take turns, however much each of them sends."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.fanout.fair_queue import FairQueue

puts = st.lists(st.sampled_from("abc"), max_size=40)


@given(puts)
def test_everything_comes_out_once_in_each_clients_order(clients: list[str]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for number, client in enumerate(clients):
        queue.put(client, (client, number))
    assert len(queue) == len(queue.items()) == len(clients)
    taken = []
    while queue.peek() is not None:
        taken.append(queue.peek())
        assert queue.pop() == taken[-1]
    assert sorted(taken, key=lambda item: item[1] if item else -1) == [(client, n) for n, client in enumerate(clients)]
    for client in "abc":
        numbers = [item[1] for item in taken if item and item[0] == client]
        assert numbers == sorted(numbers)
    with pytest.raises(IndexError):
        queue.pop()


@given(puts)
def test_no_client_waits_for_more_than_one_item_of_each_other_client(clients: list[str]) -> None:
    queue: FairQueue[str] = FairQueue()
    for client in clients:
        queue.put(client, client)
    remaining = Counter(clients)
    waited: Counter[str] = Counter()
    for client in queue.drain():
        remaining[client] -= 1
        waited[client] = 0
        for other in "abc":
            if other != client and remaining[other]:
                waited[other] += 1
                assert waited[other] <= 2
