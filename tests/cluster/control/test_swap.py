"""One swap: receipts of every live incarnation before the commit, and no event out of season does any harm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.control.events import (
    Action,
    CommitRefused,
    CommitSwap,
    Committed,
    DiedStaging,
    Event,
    FinishSwap,
    MemberGone,
    MemberReported,
    NotReached,
    RouterGone,
    RouterReported,
    StageCandidate,
    Staged,
    StageRefused,
    Sync,
    TimeUp,
)
from expertmesh.cluster.control.swap import Phase, Swap, Swaps
from expertmesh.experts.errors import Aborted, DeadlineExceeded, ExpertMeshError, FailedPrecondition

A, B = frozenset(["l/a"]), frozenset(["l/a", "l/b"])
ORDER = (Phase.STAGING, Phase.COMMITTING, Phase.FLIPPING, Phase.RETIRING, Phase.DONE)
ERROR = FailedPrecondition("wrong shape")


def told(swap: Swap, *events: Event) -> list[Action]:
    return [action for event in events for action in swap.on(event)]


def staged(member: str, incarnation: str, id: str = "l/a", version: str = "v2") -> Staged:
    return Staged(member, incarnation, id, version)


def committing() -> Swap:
    swap = Swap("s", A)
    told(swap, RouterReported("r", 1, 1), MemberReported("m", "m.1", A), staged("m", "m.1"))
    assert swap.phase is Phase.COMMITTING
    return swap


def test_a_swap_from_its_beginning_to_its_end() -> None:
    swap = Swap("s", B)
    assert told(swap, RouterReported("r", 1, 1)) == []
    assert told(swap, MemberReported("m", "m.1", B)) == [
        StageCandidate("m", "m.1", "s", "l/a"),
        StageCandidate("m", "m.1", "s", "l/b"),
    ]
    assert told(swap, MemberReported("n", "n.1", A)) == [StageCandidate("n", "n.1", "s", "l/a")]
    assert told(swap, staged("m", "m.1"), staged("m", "m.1", "l/b", "v5")) == []
    assert swap.receipts() == (2, 3)
    assert told(swap, staged("n", "n.1")) == [CommitSwap("s", {"l/a": "v2", "l/b": "v5"})]
    assert told(swap, Committed(2)) == [Sync()]
    assert swap.epoch == 2
    assert told(swap, RouterReported("r", 2, 1)) == [FinishSwap("s", 2)]
    assert swap.phase is Phase.RETIRING
    assert told(swap, RouterReported("r", 2, 2)) == []
    assert swap.phase is Phase.DONE
    assert swap.history == [
        "Staged: staging -> committing",
        "Committed: committing -> flipping",
        "RouterReported: flipping -> retiring",
        "RouterReported: retiring -> done",
    ]


def test_a_swap_that_only_takes_away_commits_once_a_member_is_there() -> None:
    swap = Swap("s", frozenset())
    assert told(swap, RouterReported("r", 1, 1)) == []
    assert told(swap, MemberReported("m", "m.1", A)) == [CommitSwap("s", {})]
    assert told(swap, MemberReported("n", "n.1", A)) == []


def test_a_restarted_member_is_asked_again_and_its_former_receipt_counts_for_nothing() -> None:
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), staged("m", "m.1"))
    assert told(swap, MemberReported("m", "m.2", A)) == [StageCandidate("m", "m.2", "s", "l/a")]
    assert told(swap, staged("n", "n.1"), staged("m", "m.1")) == []
    assert told(swap, staged("m", "m.2")) == [CommitSwap("s", {"l/a": "v2"})]


def test_a_member_that_was_lost_and_is_back_is_asked_again() -> None:
    """It may have been slow only; its receipt was forgotten, so without another one nothing would ever go on."""
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), staged("m", "m.1"), MemberGone("m"))
    assert told(swap, MemberReported("m", "m.1", A)) == [StageCandidate("m", "m.1", "s", "l/a")]
    assert told(swap, staged("n", "n.1")) == []
    assert told(swap, staged("m", "m.1")) == [CommitSwap("s", {"l/a": "v2"})]


def test_the_others_go_on_without_a_member_that_is_gone_but_never_without_all() -> None:
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), staged("m", "m.1"))
    assert told(swap, MemberGone("n")) == [CommitSwap("s", {"l/a": "v2"})]
    swap = Swap("s", A)
    assert told(swap, MemberReported("m", "m.1", A), MemberGone("m")) == [StageCandidate("m", "m.1", "s", "l/a")]
    assert swap.phase is Phase.STAGING


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (StageRefused("m", "m.1", "l/a", ERROR), FailedPrecondition),
        (DiedStaging("n", "l/a"), FailedPrecondition),
        (staged("n", "n.1", version="v3"), FailedPrecondition),
        (TimeUp(), DeadlineExceeded),
    ],
)
def test_what_aborts_a_swap_aborts_all_of_it_with_a_reason(event: Event, kind: type[ExpertMeshError]) -> None:
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), staged("m", "m.1"))
    (finish,) = told(swap, event)
    assert isinstance(finish, FinishSwap)
    assert finish.epoch is None
    assert isinstance(finish.error, kind)
    assert swap.phase is Phase.ABORTED
    assert told(swap, staged("n", "n.1"), Committed(2), RouterReported("r", 2, 2), TimeUp()) == []


def test_one_member_that_died_of_a_candidate_is_enough_and_the_expert_is_named() -> None:
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), MemberGone("m"))
    (finish,) = told(swap, DiedStaging("m", "l/a"))
    assert isinstance(finish, FinishSwap)
    assert "l/a: the process of m ended while it built the new version" in str(finish.error)
    assert told(swap, MemberReported("m", "m.2", A)) == []  # it is not asked again


def test_new_code_is_tried_by_one_member_before_the_others() -> None:
    swap = Swap("s", A, new_code=A)
    reported = [MemberReported(name, f"{name}.1", A) for name in "mno"]
    assert told(swap, *reported) == [StageCandidate("m", "m.1", "s", "l/a")]
    assert told(swap, reported[1]) == []
    assert told(swap, MemberGone("m"), NotReached("n", "l/a")) == []  # of what it died is not known yet
    assert told(swap, NotReached("m", "l/a")) == [StageCandidate("n", "n.1", "s", "l/a")]  # not of the candidate
    assert told(swap, MemberReported("m", "m.2", A)) == []
    others = [StageCandidate("o", "o.1", "s", "l/a"), StageCandidate("m", "m.2", "s", "l/a")]
    assert told(swap, staged("n", "n.1")) == others
    assert told(swap, staged("m", "m.2"), staged("o", "o.1")) == [CommitSwap("s", {"l/a": "v2"})]


def test_who_tried_new_code_and_is_back_is_asked_again() -> None:
    swap = Swap("s", A, new_code=A)
    told(swap, MemberReported("m", "m.1", A), MemberReported("n", "n.1", A), MemberGone("m"))
    (asked,) = told(swap, MemberReported("m", "m.2", A))
    assert asked in [StageCandidate("m", "m.2", "s", "l/a"), StageCandidate("n", "n.1", "s", "l/a")]


def test_new_code_of_one_expert_holds_up_no_other() -> None:
    swap = Swap("s", B, new_code=A)
    asked = told(swap, MemberReported("m", "m.1", B), MemberReported("n", "n.1", B))
    assert asked == [
        StageCandidate("m", "m.1", "s", "l/a"),
        StageCandidate("m", "m.1", "s", "l/b"),
        StageCandidate("n", "n.1", "s", "l/b"),
    ]


def test_time_that_is_up_names_who_is_waited_for() -> None:
    swap = Swap("s", B)
    told(swap, MemberReported("m", "m.1", A))
    (finish,) = told(swap, TimeUp())
    assert isinstance(finish, FinishSwap)
    assert "m for l/a, any replica of l/b" in str(finish.error)


def test_the_refusal_of_an_incarnation_that_is_gone_aborts_nothing() -> None:
    swap = Swap("s", A)
    told(swap, MemberReported("m", "m.2", A))
    assert told(swap, StageRefused("m", "m.1", "l/a", ERROR), StageRefused("x", "x.1", "l/a", ERROR)) == []
    assert swap.phase is Phase.STAGING


def test_from_the_commit_on_only_the_registry_can_refuse() -> None:
    swap = committing()
    refused, died = StageRefused("m", "m.1", "l/a", ERROR), DiedStaging("m", "l/a")
    assert told(swap, TimeUp(), refused, died, MemberGone("m")) == []
    assert swap.phase is Phase.COMMITTING
    assert told(swap, CommitRefused(ERROR)) == [FinishSwap("s", None, ERROR)]
    swap = committing()
    told(swap, Committed(2))
    assert told(swap, CommitRefused(ERROR), TimeUp(), Committed(3)) == []
    assert (swap.phase, swap.epoch) == (Phase.FLIPPING, 2)


def test_a_router_whose_lease_has_ended_holds_nothing_up() -> None:
    swap = committing()
    told(swap, RouterReported("slow", 1, 1), Committed(2))
    assert told(swap, RouterReported("r", 2, 2)) == []
    assert told(swap, RouterGone("slow")) == [FinishSwap("s", 2)]
    assert swap.phase is Phase.DONE


def test_without_any_router_nothing_is_said_to_have_flipped() -> None:
    swap = committing()
    assert told(swap, RouterGone("r"), Committed(2)) == [Sync()]
    assert (swap.phase, swap.epoch) == (Phase.FLIPPING, 2)


def test_two_swaps_of_one_id_cannot_be_under_way_together() -> None:
    swaps = Swaps()
    first = swaps.begin("s1", A)
    with pytest.raises(Aborted, match=r"another swap \(s1\) is under way"):
        swaps.begin("s2", B)
    assert swaps.begin("s3", frozenset(["l/c"])) is swaps.find("s3")
    told(first, MemberReported("m", "m.1", A), staged("m", "m.1"), RouterReported("r", 1, 1), Committed(2))
    told(first, RouterReported("r", 2, 1))
    with pytest.raises(Aborted, match="still draining"):
        swaps.begin("s2", A)
    told(first, RouterReported("r", 2, 2))
    swaps.begin("s2", A)
    assert [swap.swap_id for swap in swaps.active()] == ["s3", "s2"]


MEMBERS = st.sampled_from(("m", "n"))
LIVES = st.sampled_from(("1", "2"))
NUMBERS = st.integers(1, 3)
EVENTS = st.one_of(
    st.builds(MemberReported, MEMBERS, LIVES, st.sampled_from((A, B))),
    st.builds(MemberGone, MEMBERS),
    st.builds(Staged, MEMBERS, LIVES, st.sampled_from(("l/a", "l/b", "l/other")), st.sampled_from(("v2", "v2", "v3"))),
    st.builds(StageRefused, st.just("n"), st.just("2"), st.just("l/a"), st.just(ERROR)),
    st.builds(DiedStaging, MEMBERS, st.just("l/a")),
    st.builds(NotReached, MEMBERS, st.just("l/a")),
    st.builds(Committed, st.integers(2, 3)),
    st.builds(CommitRefused, st.just(ERROR)),
    st.builds(RouterReported, st.sampled_from(("r", "s")), NUMBERS, NUMBERS),
    st.builds(RouterGone, st.sampled_from(("r", "s"))),
    st.builds(TimeUp),
)


@given(st.lists(EVENTS, max_size=40), st.sampled_from((frozenset[str](), A, B)))
@settings(max_examples=400, deadline=None)
def test_any_events_in_any_order_commit_once_finish_once_and_only_with_all_receipts(
    events: list[Event], new_code: frozenset[str]
) -> None:
    swap = Swap("s", B, new_code)
    live: dict[str, tuple[str, frozenset[str]]] = {}
    receipts: set[tuple[str, str, str]] = set()
    actions: list[Action] = []
    for event in events:
        before = swap.phase
        if isinstance(event, MemberReported):
            live[event.member] = (event.incarnation, event.ids)
        elif isinstance(event, MemberGone):
            live.pop(event.member, None)
        elif isinstance(event, Staged):
            receipts.add((event.member, event.incarnation, event.id))
        new = swap.on(event)
        actions += new
        if any(isinstance(action, CommitSwap) for action in new):
            assert {(m, life, id) for m, (life, ids) in live.items() for id in ids} <= receipts
            assert swap.versions().keys() == B
        went = swap.phase is before or swap.phase is Phase.ABORTED or ORDER.index(before) < ORDER.index(swap.phase)
        assert went, f"{before} -> {swap.phase}"
        assert before not in (Phase.DONE, Phase.ABORTED) or not new
    commits = [action for action in actions if isinstance(action, CommitSwap)]
    finishes = [action for action in actions if isinstance(action, FinishSwap)]
    assert len(commits) <= 1
    assert len(finishes) == (swap.phase in (Phase.RETIRING, Phase.DONE, Phase.ABORTED))
    assert all((finish.epoch is None) == (swap.phase is Phase.ABORTED) for finish in finishes)
    assert bool(swap.epoch) <= bool(commits)


@given(st.lists(EVENTS, max_size=30))
@settings(deadline=None)
def test_an_event_that_comes_twice_in_a_row_changes_nothing_more(events: list[Event]) -> None:
    once, twice = Swap("s", B), Swap("s", B)
    for event in events:
        assert repr(told(twice, event)) == repr(told(once, event))
        assert told(twice, event) == []
    assert (once.phase, once.epoch, once.versions()) == (twice.phase, twice.epoch, twice.versions())
