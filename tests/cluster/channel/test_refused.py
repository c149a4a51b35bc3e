"""Routers that a replica serves no longer."""

from __future__ import annotations

from expertmesh.cluster.channel.refused import REMEMBERED, Refused, identity


def test_a_session_is_refused_and_the_next_one_of_the_same_router_is_not() -> None:
    refused = Refused()
    refused.add({"a": "s"}, [])
    assert identity("a", "s") in refused
    assert identity("a", "t") not in refused
    assert identity("b", "s") not in refused


def test_where_no_session_is_known_those_that_are_connected_are_refused() -> None:
    refused = Refused()
    refused.add({"a": ""}, [identity("a", "s"), identity("ab", "s"), ""])
    assert identity("a", "s") in refused
    assert identity("a", "t") not in refused
    assert identity("ab", "s") not in refused
    assert "" not in refused


def test_it_remembers_many_and_not_for_ever() -> None:
    refused = Refused()
    for n in range(REMEMBERED + 1):
        refused.add({"a": str(n)}, [])
    assert identity("a", "0") not in refused
    assert identity("a", "1") in refused
    assert identity("a", str(REMEMBERED)) in refused
