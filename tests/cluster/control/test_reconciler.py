"""The controller's decisions: whoever restarts is brought up to date, and nothing that may be pinned is unloaded."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.control.events import (
    Action,
    CommitSwap,
    FinishSwap,
    LoadVersion,
    StageCandidate,
    Sync,
    UnloadVersion,
)
from expertmesh.cluster.control.reconciler import Reconciler, refuse_unless_current
from expertmesh.experts.errors import Aborted, ExpertMeshError, FailedPrecondition

A = frozenset(["l/a"])
ONE, TWO, THREE = {"l/a": "v1", "l/b": "v1"}, {"l/a": "v2", "l/b": "v1"}, {"l/a": "v3", "l/b": "v1"}
ERROR = FailedPrecondition("wrong shape")


def held(*versions: str) -> frozenset[tuple[str, str]]:
    return frozenset(("l/a", version) for version in versions)


def started(*members: str) -> Reconciler:
    """A controller at epoch 1 with router r and these members, which hold its versions."""
    control = Reconciler()
    control.restore({1: ONE}, ["r"])
    control.router_reported("r", 1, 1)
    for member in members:
        assert control.member_reported(member, f"{member}.1", A, held("v1")) == []
    return control


def committed(control: Reconciler, members: Iterable[str] = ("m",)) -> list[Action]:
    """Swap l/a to v2 up to the commit."""
    control.swap_asked("s", A)
    for member in members:
        control.staged("s", member, f"{member}.1", "l/a", "v2")
    return control.committed("s", 2, TWO)


def test_a_swap_from_the_question_to_the_last_unload() -> None:
    control = started("m", "n")
    stages = [StageCandidate(member, f"{member}.1", "s", "l/a") for member in "mn"]
    assert control.swap_asked("s", A) == stages
    assert control.staged("s", "m", "m.1", "l/a", "v2") == []
    assert control.staged("s", "n", "n.1", "l/a", "v2") == [CommitSwap("s", {"l/a": "v2"})]
    assert set(map(type, control.committed("s", 2, TWO))) == {Sync}
    assert control.known_to_routers() == {2: TWO}
    assert control.router_reported("r", 2, 1) == [FinishSwap("s", 2, None)]
    assert control.member_reported("m", "m.1", A, held("v1", "v2")) == []
    assert control.router_reported("r", 2, 2) == [UnloadVersion(m, f"{m}.1", "l/a", "v1") for m in "mn"]
    assert control.swaps.active() == []


def test_a_swap_id_that_is_under_way_begins_nothing_new() -> None:
    control = started("m")
    assert control.swap_asked("s", A)
    assert control.swap_asked("s", A) == []
    with pytest.raises(Aborted):
        control.swap_asked("other", A)


def test_after_an_abort_the_candidates_go_and_the_old_version_stays() -> None:
    control = started("m", "n")
    control.swap_asked("s", A)
    control.staged("s", "m", "m.1", "l/a", "v2")
    actions = control.stage_refused("s", "n", "n.1", "l/a", ERROR)
    assert FinishSwap("s", None, ERROR) in actions
    assert UnloadVersion("m", "m.1", "l/a", "v2") in actions
    assert all(action.version != "v1" for action in actions if isinstance(action, UnloadVersion))
    assert control.current == 1
    assert control.staged("s", "n", "n.1", "l/a", "v2") == []
    assert control.member_reported("n", "n.1", A, held("v1", "v2")) == [UnloadVersion("n", "n.1", "l/a", "v2")]


def test_a_member_that_died_of_a_candidate_comes_back_with_what_serves() -> None:
    control = started("m", "n")
    control.swap_asked("s", A)
    control.staged("s", "n", "n.1", "l/a", "v2")
    actions = control.died_staging("s", "m", "l/a")
    assert UnloadVersion("n", "n.1", "l/a", "v2") in actions
    assert any(isinstance(action, FinishSwap) and action.epoch is None for action in actions)
    assert control.members() == {"n": "n.1"}
    assert control.member_reported("m", "m.2", A, held()) == [LoadVersion("m", "m.2", "l/a", "v1")]


def test_a_restarted_member_loads_every_version_in_use() -> None:
    control = started("m")
    committed(control)
    assert control.member_reported("m", "m.2", A, frozenset()) == [
        LoadVersion("m", "m.2", "l/a", "v1"),
        LoadVersion("m", "m.2", "l/a", "v2"),
    ]
    assert control.member_reported("m", "m.2", A, frozenset()) == []
    assert control.loaded("m", "m.1", "l/a", "v1") == []
    assert control.loaded("m", "m.2", "l/a", "v1") == [Sync()]
    control.load_failed("m", "m.2", "l/a", "v2")
    assert control.member_reported("m", "m.2", A, held("v1")) == [LoadVersion("m", "m.2", "l/a", "v2")]
    assert control.incomplete() == [("m", "l/a", "v2")]


def test_what_serves_is_loaded_before_a_candidate_is_staged() -> None:
    """A replica that restarts during a swap is missed for what it held, not for what it may hold."""
    control = started("m", "n")
    control.swap_asked("s", A)
    assert control.member_reported("m", "m.2", A, frozenset()) == [
        LoadVersion("m", "m.2", "l/a", "v1"),
        StageCandidate("m", "m.2", "s", "l/a"),
    ]


def test_while_a_router_has_not_been_heard_nothing_is_unloaded_and_no_swap_begins() -> None:
    """A controller that has just started does not know what requests still need."""
    control = Reconciler()
    control.restore({1: ONE, 2: TWO}, ["r", "q"])
    assert control.member_reported("m", "m.1", A, held("v1", "v2")) == []
    assert control.router_reported("r", 2, 2) == []
    with pytest.raises(Aborted, match="draining"):
        control.swap_asked("s", A)
    assert control.oldest_needed() == 1
    assert control.router_lost("q") == [UnloadVersion("m", "m.1", "l/a", "v1")]
    assert control.swap_asked("s", A)


def test_a_swap_waits_for_a_router_that_has_joined_to_adopt_its_epoch() -> None:
    control = started("m")
    committed(control)
    assert control.router_joined("late", fresh=True) == []
    assert control.router_reported("r", 2, 2) == []
    assert FinishSwap("s", 2, None) in control.router_reported("late", 2, 2)


def test_a_router_that_has_served_may_pin_anything_until_it_has_reported_or_is_lost() -> None:
    for heard in (True, False):
        control = started("m")
        control.router_joined("old", fresh=False)
        with pytest.raises(Aborted, match="draining"):
            control.swap_asked("s", A)
        control.router_reported("old", 1, 1) if heard else control.router_lost("old")
        assert committed(control)
        assert [FinishSwap("s", 2, None)] == [
            action
            for action in (
                *control.router_reported("r", 2, 2),
                *(control.router_reported("old", 2, 2) if heard else ()),
            )
            if isinstance(action, FinishSwap)
        ]


def test_a_router_that_joins_again_is_known_as_before() -> None:
    control = started("m")
    committed(control)
    control.router_reported("old", 1, 1)
    control.router_joined("old", fresh=False)
    assert control.router_reported("r", 2, 2) == []
    assert FinishSwap("s", 2, None) in control.router_reported("old", 2, 1)
    assert unloads(control.member_reported("m", "m.1", A, held("v1", "v2"))) == []
    assert unloads(control.router_reported("old", 2, 2)) == [UnloadVersion("m", "m.1", "l/a", "v1")]


def test_a_swap_is_refused_while_an_older_version_is_pinned_also_by_the_next_controller() -> None:
    control = Reconciler()
    control.restore({1: ONE, 2: TWO}, ["r"])
    control.router_reported("r", 2, 1)
    with pytest.raises(Aborted, match="l/a: the previous swap is still draining"):
        control.swap_asked("s", A)
    control.swap_asked("other", frozenset(["l/b"]))
    control.router_reported("r", 2, 2)
    control.swap_asked("s", A)


def test_what_is_pinned_is_kept_although_the_registry_has_collected_it() -> None:
    control = started("m")
    committed(control)
    control.router_reported("r", 2, 1)
    assert control.oldest_needed() == 1
    control.forget_epochs({2: TWO})
    assert control.member_reported("m", "m.2", A, frozenset())[0] == LoadVersion("m", "m.2", "l/a", "v1")
    control.router_reported("r", 2, 2)
    assert control.oldest_needed() == 2
    control.forget_epochs({2: TWO})
    assert control.epochs == {2: TWO}


def test_while_an_epoch_is_pinned_that_is_not_known_nothing_is_unloaded() -> None:
    control = Reconciler()
    control.restore({2: TWO, 3: THREE}, ["r"])
    control.router_reported("r", 3, 1)
    assert not [
        action
        for action in control.member_reported("m", "m.1", A, held("v1", "v2", "v3"))
        if isinstance(action, UnloadVersion)
    ]
    assert control.router_reported("r", 3, 3) == [UnloadVersion("m", "m.1", "l/a", v) for v in ("v1", "v2")]


def test_a_recalled_epoch_is_loaded_beside_the_current_one_until_it_is_released() -> None:
    control = Reconciler()
    control.declared = A
    control.restore({1: ONE, 2: TWO})
    control.router_reported("r", 2, 2)
    assert control.member_reported("m", "m.1", A, held("v2")) == []
    assert control.recall(1) == [Sync(), LoadVersion("m", "m.1", "l/a", "v1")]
    assert control.known_to_routers() == {2: TWO}
    assert ("l/a", "v1") in control.lacking(1)
    control.loaded("m", "m.1", "l/a", "v1")
    assert ("l/a", "v1") not in control.lacking(1)
    assert control.known_to_routers() == {1: ONE, 2: TWO}
    assert UnloadVersion("m", "m.1", "l/a", "v1") in control.release(1)


@pytest.mark.parametrize("reported", [False, True])
def test_what_was_loaded_and_unloaded_is_loaded_again(reported: bool) -> None:
    """Also where no report of the member came in between: that it was asked for once must not count for ever."""
    control = Reconciler()
    control.restore({1: ONE, 2: TWO})
    control.router_reported("r", 2, 2)
    control.member_reported("m", "m.1", A, held("v2"))
    for _ in range(3):
        assert LoadVersion("m", "m.1", "l/a", "v1") in control.recall(1)
        control.loaded("m", "m.1", "l/a", "v1")
        if reported:
            control.member_reported("m", "m.1", A, held("v1", "v2"))
        assert UnloadVersion("m", "m.1", "l/a", "v1") in control.release(1)
        assert control.begin_unload("m", "m.1", "l/a", "v1")


def recalled() -> Reconciler:
    """At epoch 2, with epoch 1 recalled and loaded."""
    control = Reconciler()
    control.declared = A
    control.restore({1: ONE, 2: TWO})
    control.router_reported("r", 2, 2)
    control.member_reported("m", "m.1", A, held("v2"))
    control.recall(1)
    control.loaded("m", "m.1", "l/a", "v1")
    return control


def unloads(actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, UnloadVersion)]


def test_a_released_epoch_stays_loaded_until_no_router_offers_it() -> None:
    control = recalled()
    control.router_told("r", control.known_to_routers())
    assert unloads(control.release(1)) == []
    assert control.known_to_routers() == {2: TWO}
    control.router_told("r", [2])
    assert unloads(control.member_reported("m", "m.1", A, held("v1", "v2"))) == []  # it is not known to have arrived
    control.forget_epochs({2: TWO})
    assert control.oldest_needed() == 1
    assert unloads(control.router_reported("r", 2, 1, [2])) == []  # a request had pinned it before
    assert unloads(control.router_reported("r", 2, 2, [2])) == [UnloadVersion("m", "m.1", "l/a", "v1")]


def test_what_a_lost_router_offered_is_offered_no_more() -> None:
    control = recalled()
    control.router_told("r", [1, 2])
    control.release(1)
    assert unloads(control.router_lost("r")) == [UnloadVersion("m", "m.1", "l/a", "v1")]


def test_a_recalled_epoch_is_withdrawn_while_its_only_member_is_lost() -> None:
    control = recalled()
    control.member_lost("m")
    assert control.known_to_routers() == {2: TWO}
    control.member_reported("m", "m.2", A, held("v1", "v2"))
    assert control.known_to_routers() == {1: ONE, 2: TWO}


def test_an_unload_is_not_begun_where_the_version_is_needed_again() -> None:
    control = recalled()
    assert unloads(control.release(1)) == [UnloadVersion("m", "m.1", "l/a", "v1")]
    assert unloads(control.member_reported("m", "m.1", A, held("v1", "v2"))) == []  # it was decided already
    assert control.recall(1) == [Sync()]  # it is still there
    assert not control.begin_unload("m", "m.1", "l/a", "v1")
    assert control.lacking(1) == []
    assert unloads(control.release(1)) == [UnloadVersion("m", "m.1", "l/a", "v1")]
    assert control.begin_unload("m", "m.1", "l/a", "v1")
    assert control.lacking(1) == [("l/a", "v1")]


def test_an_unload_is_begun_neither_for_another_incarnation_nor_while_a_swap_stages() -> None:
    control = recalled()
    control.release(1)
    assert not control.begin_unload("m", "m.0", "l/a", "v1")
    control.swap_asked("s", A)
    assert not control.begin_unload("m", "m.1", "l/a", "v1")


def test_an_action_for_an_incarnation_that_is_gone_is_not_taken_for_its_successor() -> None:
    control = started("m")
    control.swap_asked("s", A)
    assert control.member_reported("m", "m.2", A, held("v1")) == [StageCandidate("m", "m.2", "s", "l/a")]
    assert control.staged("s", "m", "m.1", "l/a", "v2") == []
    assert control.stage_refused("s", "m", "m.1", "l/a", ERROR) == []
    assert control.staged("s", "m", "m.2", "l/a", "v2") == [CommitSwap("s", {"l/a": "v2"})]


def test_what_was_taken_away_is_used_until_no_router_pins_it() -> None:
    control = started("m")
    both, one = (
        {"l/a": "v1", "l/b": "v1", "l/layer": "v1", "l/gate": "v1"},
        {"l/a": "v1", "l/layer": "v2", "l/gate": "v2"},
    )
    control.epochs[1] = both
    control.swap_asked("s", frozenset())
    control.committed("s", 2, one)
    assert control.used() == both.keys()
    assert control.structure() == {"l/layer", "l/gate"}
    control.router_reported("r", 2, 1)
    assert "l/b" in control.used()
    control.router_reported("r", 2, 2)
    assert control.used() == one.keys()


def test_what_is_used_again_is_not_ended() -> None:
    """An epoch may have been recalled since the owner has looked at what is used."""
    control = started("m")
    control.committed("s", 2, {"l/b": "v1"})
    control.router_reported("r", 2, 2, [2])
    control.check_unused(A)
    control.recall(1)
    with pytest.raises(Aborted, match="l/a: a request may still need it"):
        control.check_unused(A)


def test_a_recalled_epoch_lacks_what_is_not_declared_any_more_until_it_is_loaded() -> None:
    control = started("m")
    control.declared = frozenset({"l/b"})
    control.committed("s", 2, {"l/b": "v1"})
    control.recall(1)
    assert ("l/a", "v1") not in control.lacking(1)
    control.member_reported("m", "m.2", A, held())
    assert ("l/a", "v1") in control.lacking(1)


def test_what_a_router_pins_that_has_not_reported_may_be_anything() -> None:
    control = Reconciler()
    control.restore({1: ONE, 2: {"l/a": "v1"}}, ["r"])
    assert control.used() == {"l/a", "l/b"}
    control.router_reported("r", 2, 2)
    assert control.used() == {"l/a"}


def test_a_refused_commit_answers_and_leaves_the_epoch() -> None:
    control = started("m")
    control.swap_asked("s", A)
    control.staged("s", "m", "m.1", "l/a", "v2")
    actions = control.commit_refused("s", ERROR)
    assert actions[0] == FinishSwap("s", None, ERROR)
    assert UnloadVersion("m", "m.1", "l/a", "v2") in actions
    assert (control.current, control.swaps.active()) == (1, [])


def test_who_expects_another_version_is_told_which_one_there_is() -> None:
    refuse_unless_current({"l/a": "v1"}, ONE)
    with pytest.raises(Aborted, match="l/a is at v1, not at v0 as expected"):
        refuse_unless_current({"l/a": "v0"}, ONE)
    with pytest.raises(Aborted, match="l/c is at nothing"):
        refuse_unless_current({"l/c": "v1"}, ONE)


MEMBERS, LIVES, VERSIONS = st.sampled_from(("m", "n")), st.sampled_from(("1", "2")), st.sampled_from(("v1", "v2"))
CALLS = st.one_of(
    st.tuples(st.just("report"), MEMBERS, LIVES, st.frozensets(VERSIONS)),
    st.tuples(st.just("lost"), MEMBERS),
    st.tuples(st.just("staged"), MEMBERS, LIVES),
    st.tuples(st.just("refused"), MEMBERS, LIVES),
    st.tuples(st.just("loaded"), MEMBERS, LIVES, VERSIONS),
    st.tuples(st.just("router"), st.sampled_from(((0, 0), (1, 1), (2, 1), (2, 2)))),
    st.tuples(st.just("router lost")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("time up")),
    st.tuples(st.just("ask")),
)


def call(control: Reconciler, name: str, *a: object) -> list[Action]:
    """One event, whether it makes sense now or not."""
    member, life = (str(a[0]), f"{a[0]}.{a[1]}") if len(a) > 1 else ("", "")
    if name == "report":
        return control.member_reported(member, life, A, held(*a[2]))  # type: ignore[misc]
    if name == "lost":
        return control.member_lost(str(a[0]))
    if name == "staged":
        return control.staged("s", member, life, "l/a", "v2")
    if name == "refused":
        return control.stage_refused("s", member, life, "l/a", ERROR)
    if name == "loaded":
        return control.loaded(member, life, "l/a", str(a[2]))
    if name == "router":
        epoch, oldest = a[0]  # type: ignore[misc]
        return control.router_reported("r", min(epoch, control.current), min(oldest, control.current))
    if name == "router lost":
        return control.router_lost("r")
    if name == "time up":
        return control.time_up("s")
    try:
        return control.swap_asked("s", A)
    except ExpertMeshError:
        return []


@given(st.lists(CALLS, max_size=40))
@settings(max_examples=400, deadline=None)
def test_whatever_happens_the_current_version_is_never_unloaded_nor_one_that_is_pinned(
    calls: list[tuple[object, ...]],
) -> None:
    control, durable = Reconciler(), False
    control.restore({1: ONE}, ["r"])
    wanted_commit = False
    for name, *arguments in calls:
        if name == "commit":
            actions = control.committed("s", 2, TWO) if wanted_commit and not durable else []
            durable = durable or wanted_commit
        else:
            actions = call(control, str(name), *arguments)
        wanted_commit = wanted_commit or any(isinstance(action, CommitSwap) for action in actions)
        assert control.current == 1 + durable
        protected = {versions["l/a"] for versions in control.in_use()}
        for action in actions:
            if isinstance(action, UnloadVersion):
                assert action.version not in protected
                assert action.incarnation == control.members()[action.member]
            if isinstance(action, LoadVersion):
                assert action.version in protected
    assert control.epochs[control.current]["l/a"] in {versions["l/a"] for versions in control.in_use()}
