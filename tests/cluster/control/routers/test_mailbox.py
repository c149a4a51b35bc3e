"""Orders wait in a mailbox until they are answered, whatever becomes of the polls that carry them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.waiting import on_a_loop, run_async, settle
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.control.routers.mailbox import Letter, Mailbox
from expertmesh.experts.errors import FailedPrecondition, Unavailable


def asked(box: Mailbox, *methods: str) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(box.ask(method, number)) for number, method in enumerate(methods)]


@on_a_loop
async def test_an_order_is_fetched_and_its_answer_given_to_who_asked() -> None:
    box = Mailbox()
    (sync,) = asked(box, "sync")
    (letter,) = await box.fetch({}, (), 1.0)
    assert letter == Letter(1, "sync", (0,))
    await box.fetch({1: "report"}, (), 0.0)
    assert await sync == "report"
    assert await box.fetch({}, (), 0.0) == ()


@on_a_loop
async def test_an_error_is_an_answer() -> None:
    box = Mailbox()
    (stage,) = asked(box, "stage")
    await settle()
    await box.fetch({1: FailedPrecondition("the gate does not fit")}, (), 0.0)
    with pytest.raises(FailedPrecondition, match="does not fit"):
        await stage


@on_a_loop
async def test_a_poll_waits_for_an_order() -> None:
    box = Mailbox()
    polls = [asyncio.ensure_future(box.fetch({}, (), 60.0)) for _ in range(2)]
    await settle()
    assert not any(poll.done() for poll in polls)
    (sync,) = asked(box, "sync")
    assert [letter.number for letter in await polls[0]] == [1]
    assert [letter.number for letter in await polls[1]] == [1]  # a doubled poll gets it, too: its number tells
    await box.fetch({1: "once"}, (), 0.0)
    assert await sync == "once"


@on_a_loop
async def test_an_order_whose_poll_was_lost_is_handed_out_again_until_it_is_held() -> None:
    box = Mailbox()
    tasks = asked(box, "declare", "sync")
    await settle()
    for _ in range(3):  # each reply is lost
        assert [letter.method for letter in await box.fetch({}, (), 0.0)] == ["declare", "sync"]
    assert [letter.number for letter in await box.fetch({}, [1], 0.0)] == [2]
    assert await box.fetch({}, [1, 2], 0.0) == ()
    for task in tasks:
        task.cancel()


@on_a_loop
async def test_an_answer_counts_once_and_none_is_taken_that_nobody_waits_for() -> None:
    box = Mailbox()
    (first, second) = asked(box, "sync", "sync")
    await settle()
    first.cancel()
    await settle()
    assert [letter.number for letter in await box.fetch({1: "too late", 7: "never asked"}, (), 0.0)] == [2]
    await box.fetch({2: "right"}, (), 0.0)
    await box.fetch({2: "a late poll"}, (), 0.0)
    assert await second == "right"


@on_a_loop
async def test_who_stops_waiting_takes_the_order_back() -> None:
    box = Mailbox()
    (sync,) = asked(box, "sync")
    await settle()
    sync.cancel()
    await settle()
    assert await box.fetch({}, (), 0.0) == ()


@on_a_loop
async def test_a_closed_mailbox_refuses_orders_and_polls() -> None:
    box = Mailbox()
    (sync,) = asked(box, "sync")
    poll = asyncio.ensure_future(box.fetch({}, [1], 60.0))
    await settle()
    box.close()
    box.close()
    for waiting in (sync, poll, box.ask("sync"), box.fetch({}, (), 0.0)):
        with pytest.raises(Unavailable):
            await waiting


@given(st.lists(st.sampled_from(["poll", "lost poll", "lost reply", "late copy"]), max_size=40), st.integers(1, 6))
def test_every_order_is_answered_once_whatever_is_lost_doubled_or_late(events: list[str], orders: int) -> None:
    """The router here holds what it was handed, and repeats its answers until a poll returns."""

    async def story() -> None:
        box = Mailbox()
        tasks = asked(box, *["sync"] * orders)
        await settle()
        held: dict[int, int] = {}
        carried: list[int] = []
        copies: list[dict[int, int]] = [{}]
        for event in [*events, *["poll"] * (orders + 1)]:
            answers = dict(held)
            copies.append(answers)
            if event == "late copy":
                await box.fetch(copies[len(copies) // 2], (), 0.0)
            if event in ("poll", "lost reply"):
                letters = await box.fetch(answers, list(held), 0.0)
                await settle()
                if event == "poll":
                    held = {letter.number: letter.number for letter in letters}
                    carried += held
        assert sorted(carried) == list(range(1, orders + 1))
        assert await asyncio.gather(*tasks) == list(range(1, orders + 1))

    run_async(story())
