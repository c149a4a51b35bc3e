"""A router in a caller's process follows its controller, whatever is lost between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.waiting import on_a_loop, until

from expertmesh.cluster.attach import follower
from expertmesh.cluster.attach.follower import Follower
from expertmesh.cluster.control.routers.mailbox import Letter, Mailbox
from expertmesh.experts.errors import ExpertMeshError, FailedPrecondition, NotFound, Unavailable


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "AGAIN_SECONDS", 0.001)


class Desk:
    """A seat at a controller of this loop; each poll, or its reply, may be lost, as `losses` says."""

    def __init__(self, losses: Iterator[str] | None = None) -> None:
        self.losses = losses or itertools.repeat("")
        self.box: Mailbox | None = None
        self.joined: list[tuple[str, bool]] = []
        self.left: list[str] = []

    async def join(self, name: str, fresh: bool) -> str:
        self.joined.append((name, fresh))
        self.box = Mailbox()
        return self.box.id

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        lost = next(self.losses)
        if lost == "poll":
            raise Unavailable("the poll was lost")
        if self.box is None or self.box.id != box:
            raise NotFound("there is no such mailbox")
        letters = await self.box.fetch(answers, held, seconds)
        if lost == "reply":
            raise Unavailable("the reply was lost")
        return letters

    async def leave(self, name: str) -> None:
        self.left.append(name)

    async def ask(self, method: str, *arguments: Any) -> Any:
        await until(lambda: self.box is not None)
        assert self.box is not None
        return await self.box.ask(method, *arguments)


class Member:
    """What carries out orders; `hold` keeps "stage" waiting."""

    def __init__(self) -> None:
        self.carried: list[Any] = []
        self.hold = asyncio.Event()

    async def carry(self, method: str, arguments: tuple[Any, ...]) -> Any:
        self.carried.append((method, *arguments))
        if method == "stage":
            await self.hold.wait()
        if method == "refuse":
            raise FailedPrecondition("not this one")
        if method == "break":
            raise ZeroDivisionError
        return f"{method} done"


@asynccontextmanager
async def followed(desk: Desk) -> Any:
    member = Member()
    followed = Follower(desk, "attached-1", member.carry, lambda: not member.carried)
    running = asyncio.ensure_future(followed.run())
    try:
        yield member, followed
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@on_a_loop
async def test_it_joins_and_carries_orders_out() -> None:
    desk = Desk()
    async with followed(desk) as (member, follows):
        assert await desk.ask("sync", 1) == "sync done"
        assert await desk.ask("sync", 2) == "sync done"
        assert desk.joined == [("attached-1", True)]
        assert member.carried == [("sync", 1), ("sync", 2)]
    await follows.leave()
    assert desk.left == ["attached-1"]


@on_a_loop
async def test_what_goes_wrong_with_an_order_is_its_answer() -> None:
    desk = Desk()
    async with followed(desk):
        with pytest.raises(FailedPrecondition, match="not this one"):
            await desk.ask("refuse")
        with pytest.raises(ExpertMeshError, match="ZeroDivisionError"):
            await desk.ask("break")
        assert await desk.ask("sync") == "sync done"


@on_a_loop
async def test_an_order_that_takes_long_holds_up_no_other() -> None:
    desk = Desk()
    async with followed(desk) as (member, _):
        stage = asyncio.ensure_future(desk.ask("stage"))
        await until(lambda: member.carried)
        assert await desk.ask("sync") == "sync done"
        assert not stage.done()
        member.hold.set()
        assert await stage == "stage done"
        assert [method for method, *_ in member.carried] == ["stage", "sync"]


@on_a_loop
async def test_an_order_is_carried_out_once_though_polls_and_replies_are_lost() -> None:
    desk = Desk(itertools.cycle(["reply", "", "poll", "reply", "poll", "", ""]))
    async with followed(desk) as (member, _):
        for number in range(10):
            assert await desk.ask("sync", number) == "sync done"
        assert member.carried == [("sync", number) for number in range(10)]


@on_a_loop
async def test_it_joins_again_where_its_mailbox_is_gone_and_drops_what_belonged_to_that() -> None:
    desk = Desk()
    async with followed(desk) as (member, _):
        stage = asyncio.ensure_future(desk.ask("stage"))
        await until(lambda: member.carried)
        assert desk.box is not None
        desk.box.close()
        desk.box = None
        with pytest.raises(Unavailable):
            await stage
        assert await desk.ask("sync") == "sync done"  # number 1 again, in another mailbox
        assert desk.joined == [("attached-1", True), ("attached-1", False)]


@on_a_loop
async def test_a_controller_that_does_not_answer_is_asked_until_it_does() -> None:
    desk = Desk(itertools.chain(["poll"] * 5, itertools.repeat("")))
    async with followed(desk) as (_, follows):
        assert await desk.ask("sync") == "sync done"
        assert follows.problem == "the poll was lost"


@on_a_loop
async def test_leaving_a_controller_that_is_gone_is_no_error() -> None:
    class Gone(Desk):
        async def leave(self, name: str) -> None:
            raise Unavailable("it has died")

    async with followed(Gone()) as (_, follows):
        await follows.leave()
