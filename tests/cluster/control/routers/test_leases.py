"""Routers that are heard, given up, gone, and back: told everything, the time too."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.control.routers.leases import LONGEST_TURN, RouterLeases


def pass_time(leases: RouterLeases, start: float, seconds: float) -> list[str]:
    """Turns of one second each; who was given up in them."""
    return [name for n in range(int(seconds) + 1) for name in leases.tick(start + n)]


def leases_of(*names: str) -> RouterLeases:
    leases = RouterLeases(10.0)
    leases.tick(0.0)
    leases.expect(names)
    return leases


def test_a_router_that_is_not_heard_is_given_up_once_and_after_its_lease_only() -> None:
    leases = leases_of("a", "b")
    assert leases.heard("a", "s")
    assert pass_time(leases, 0.0, 10.0) == []
    assert leases.heard("b", "t")
    assert pass_time(leases, 10.0, 1.0) == ["a"]
    assert pass_time(leases, 11.0, 5.0) == []
    assert leases.given_up == {"a": "s"}
    assert leases.session("a") == ""
    assert leases.session("b") == "t"


def test_a_router_that_was_never_heard_is_given_up_by_its_name() -> None:
    leases = leases_of("a")
    assert pass_time(leases, 0.0, 11.0) == ["a"]
    assert leases.given_up == {"a": ""}


def test_a_router_is_gone_only_once_all_replicas_that_may_serve_refuse_it() -> None:
    leases = leases_of("a")
    leases.heard("a", "s")
    leases.told("r", {})
    pass_time(leases, 0.0, 11.0)
    assert leases.leave(["r", "q"]) == []
    leases.told("r", leases.given_up)
    assert leases.leave(["r", "q"]) == []
    assert not leases.gone
    leases.down("q")
    assert leases.leave(["r", "q"]) == ["a"]
    assert leases.gone == {"a"}
    leases.told("q", leases.given_up)
    assert leases.leave(["r", "q"]) == []  # said once


def test_what_a_replica_was_told_of_another_session_does_not_count() -> None:
    leases = leases_of("a")
    leases.heard("a", "s")
    pass_time(leases, 0.0, 11.0)
    leases.told("r", leases.given_up)
    assert leases.heard("a", "t")
    pass_time(leases, 11.0, 11.0)
    assert leases.given_up == {"a": "t"}
    assert leases.leave(["r"]) == []


def test_one_that_was_given_up_is_back_under_another_session_and_not_before() -> None:
    leases = leases_of("a")
    leases.heard("a", "s")
    pass_time(leases, 0.0, 11.0)
    leases.leave([])
    assert not leases.heard("a", "s")
    assert leases.gone == {"a"}
    assert leases.session("a") == ""
    assert leases.heard("a", "t")
    assert not leases.gone
    assert not leases.given_up
    assert leases.session("a") == "t"


def test_a_controller_that_was_frozen_itself_gives_nobody_up() -> None:
    leases = leases_of("a")
    leases.heard("a", "s")
    assert leases.tick(1000.0) == []
    assert leases.tick(1000.0 + LONGEST_TURN) == []


def test_who_has_left_is_forgotten() -> None:
    leases = leases_of("a", "b")
    leases.heard("a", "s")
    leases.expect(["b"])
    assert leases.session("a") == ""
    assert pass_time(leases, 0.0, 11.0) == ["b"]


@given(st.lists(st.tuples(st.sampled_from(["hear", "tell", "leave", "wait"]), st.sampled_from("ab")), max_size=60))
def test_who_is_gone_is_given_up_and_nobody_else(steps: list[tuple[str, str]]) -> None:
    leases, now, sessions = leases_of("a", "b"), 0.0, {"a": 0, "b": 0}
    for step, name in steps:
        if step == "hear":
            sessions[name] += name in leases.given_up
            assert leases.heard(name, f"{name}{sessions[name]}")
            assert name not in leases.gone
        elif step == "tell":
            leases.told(name, leases.given_up)
        elif step == "leave":
            assert set(leases.leave("ab")) <= leases.given_up.keys()
        else:
            now += 2.5
            leases.tick(now)
        assert leases.gone <= leases.given_up.keys()
