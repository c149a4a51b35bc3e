"""What is asked of the owner: it is fetched and answered once, and an owner that is away leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from helpers.waiting import eventually, on_a_loop, until

from expertmesh.cluster.control.messages import ScaleRequest
from expertmesh.cluster.control.routers.mailbox import Letter
from expertmesh.cluster.owner.asked import Asked
from expertmesh.cluster.runtime import owner_desk
from expertmesh.cluster.runtime.owner_desk import OwnerDesk
from expertmesh.experts.errors import ExpertMeshError, NotFound, Unavailable

REQUEST = ScaleRequest(change_id="c", replicas={"l/a": 2}, timeout=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_desk, "AWAY_SECONDS", 0.05)
    monkeypatch.setattr(owner_desk, "LATE_SECONDS", 0.05)


@on_a_loop
async def test_an_owner_that_was_never_heard_or_fetches_nothing_is_away() -> None:
    desk = OwnerDesk()
    with pytest.raises(Unavailable, match="nothing was changed"):
        await desk.ask(REQUEST)
    assert await desk.fetch({}) == ()
    with pytest.raises(Unavailable, match="nothing was changed"):
        await desk.ask(REQUEST)
    assert await desk.fetch({}) == ()  # it was taken back


@on_a_loop
async def test_an_answer_reaches_whoever_asked_and_a_lost_poll_loses_nothing() -> None:
    desk = OwnerDesk()
    await desk.fetch({})
    asking = asyncio.ensure_future(desk.ask(REQUEST))
    letters: tuple[Letter, ...] = ()
    while not letters:
        letters = await desk.fetch({})
        await asyncio.sleep(0)
    assert await desk.fetch({}) == letters  # as if the reply had been lost
    assert letters[0].arguments == (REQUEST,)
    assert await desk.fetch({letters[0].number: {"l/a": {"before": 1, "after": 2}}}) == ()
    assert await asking == {"l/a": {"before": 1, "after": 2}}


@on_a_loop
async def test_an_error_is_raised_and_a_missing_answer_says_that_it_is_unknown() -> None:
    desk = OwnerDesk()
    for answer, error in (
        (NotFound("no such expert"), "no such expert"),
        (None, "has not said what became of change c"),
    ):
        await desk.fetch({})
        asking = asyncio.ensure_future(desk.ask(REQUEST))
        await until(lambda desk=desk: desk._box._waiting)
        (letter,) = await desk.fetch({})
        if answer is not None:
            await desk.fetch({letter.number: answer})
        with pytest.raises(ExpertMeshError, match=error):
            await asking


class Backend:
    """Hands out the letters it is given, and keeps the answers; the poll is lost where `lost`."""

    def __init__(self) -> None:
        self.letters: tuple[Letter, ...] = ()
        self.answers: dict[int, Any] = {}
        self.lost = False

    def changes(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        if self.lost:
            raise Unavailable("lost")
        self.answers |= answers
        return tuple(letter for letter in self.letters if letter.number not in self.answers)


def test_a_change_that_is_asked_for_twice_is_made_once() -> None:
    backend, made, may_end = Backend(), list[ScaleRequest](), threading.Event()

    def carry_out(request: ScaleRequest) -> dict[str, Any]:
        made.append(request)
        assert may_end.wait(20)
        return {"l/a": {"before": 1, "after": 2}}

    asked = Asked(carry_out)
    backend.letters = (Letter(1, "scale", (REQUEST,)), Letter(2, "scale", (REQUEST,)))
    asked.follow(backend)  # type: ignore[arg-type]
    asked.follow(backend)  # type: ignore[arg-type]
    assert backend.answers == {}
    may_end.set()

    def follow() -> bool:
        asked.follow(backend)  # type: ignore[arg-type]
        return len(backend.answers) == 2

    eventually(follow, 20, "both are answered")
    backend.lost = True
    with pytest.raises(Unavailable):
        asked.follow(backend)  # type: ignore[arg-type]
    backend.lost = False
    backend.letters = (Letter(3, "scale", (REQUEST,)),)  # of a controller that has restarted meanwhile
    eventually(lambda: asked.follow(backend) or 3 in backend.answers, 20, "it is answered again")  # type: ignore[arg-type,func-returns-value]
    assert made == [REQUEST]
    assert {str(answer) for answer in backend.answers.values()} == {"{'l/a': {'before': 1, 'after': 2}}"}


@pytest.mark.parametrize(("raised", "told"), [(NotFound("no"), "no"), (KeyError("x"), "failed with KeyError")])
def test_what_goes_wrong_is_the_answer(raised: Exception, told: str) -> None:
    def carry_out(request: ScaleRequest) -> dict[str, Any]:
        raise raised

    backend, asked = Backend(), Asked(carry_out)
    backend.letters = (Letter(1, "scale", (REQUEST,)),)
    eventually(lambda: asked.follow(backend) or backend.answers, 20, "it is answered")  # type: ignore[arg-type,func-returns-value]
    assert isinstance(backend.answers[1], ExpertMeshError)
    assert told in backend.answers[1].message
