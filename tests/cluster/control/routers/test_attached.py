"""Attached routers have a mailbox each at their controller, which remembers them over its own restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import on_a_loop, run_async, settle

from expertmesh.cluster.control.messages import Candidate, Desired, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.control.routers.attached import RECORD, AllRouters, AttachedRouters
from expertmesh.cluster.control.routers.mailbox import Mailbox
from expertmesh.experts.errors import NotFound, Unavailable


class Members:
    """The part of a controller that knows its routers."""

    def __init__(self) -> None:
        self.joined: dict[str, tuple[Any, bool]] = {}
        self.gone: dict[str, Callable[[], None]] = {}

    async def join(self, name: str, handle: Any, gone: Callable[[], None], *, fresh: bool) -> None:
        self.joined[name], self.gone[name] = (handle, fresh), gone

    async def left(self, name: str) -> None:
        if self.joined.pop(name, None):
            self.gone.pop(name)()


def opened(folder: Path) -> tuple[AttachedRouters, Members]:
    members = Members()

    async def controller() -> Any:
        return members

    return AttachedRouters(controller, str(folder)), members


def test_a_router_joins_is_served_and_leaves(tmp_path: Path) -> None:
    async def story() -> None:
        routers, members = opened(tmp_path)
        box_id = await routers.join("attached-1", True)
        box, fresh = members.joined["attached-1"]
        assert (box.id, fresh) == (box_id, True)
        assert await routers.fetch("attached-1", box_id, {}, (), 0.0) == ()
        for name, unknown in (("attached-2", box_id), ("attached-1", "another")):
            with pytest.raises(NotFound, match="has to join"):
                await routers.fetch(name, unknown, {}, (), 0.0)
        await routers.leave("attached-1")
        await routers.leave("attached-1")
        with pytest.raises(NotFound):
            await routers.fetch("attached-1", box_id, {}, (), 0.0)
        with pytest.raises(Unavailable):
            await box.ask("sync")

    run_async(story())


def test_one_that_joins_again_has_another_mailbox_and_the_end_of_the_first_does_not_end_it(tmp_path: Path) -> None:
    async def story() -> None:
        routers, members = opened(tmp_path)
        first = await routers.join("attached-1", True)
        ended = members.gone["attached-1"]
        second = await routers.join("attached-1", False)
        ended()
        assert await routers.fetch("attached-1", second, {}, (), 0.0) == ()
        with pytest.raises(NotFound):
            await routers.fetch("attached-1", first, {}, (), 0.0)

    run_async(story())


def test_a_controller_that_starts_again_knows_the_members_of_the_one_before(tmp_path: Path) -> None:
    async def story() -> None:
        routers, _ = opened(tmp_path)
        box_id = await routers.join("attached-1", True)
        await routers.join("attached-2", True)
        await routers.leave("attached-2")
        again, members = opened(tmp_path)
        await again.restore()
        await again.restore()
        assert {name: fresh for name, (_, fresh) in members.joined.items()} == {"attached-1": False}
        with pytest.raises(NotFound):
            await again.fetch("attached-1", box_id, {}, (), 0.0)
        await again.join("attached-1", False)
        await again.leave("attached-1")
        third, members = opened(tmp_path)
        await third.restore()
        assert members.joined == {}

    run_async(story())


@pytest.mark.parametrize("content", ["", "{", "7", '{"a": 1}', '[7, "../x", null]'])
def test_a_damaged_record_names_nobody(tmp_path: Path, content: str) -> None:
    async def story() -> None:
        (tmp_path / RECORD).write_text(content)
        routers, members = opened(tmp_path)
        await routers.join("attached-1", True)
        assert members.joined.keys() == {"attached-1"}

    run_async(story())


class Called:
    """A `RouterPort` that notes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __getattr__(self, method: str) -> Any:
        async def ask(*given: Any) -> Any:
            self.asked.append((method, given[0] if method == "declare" else given[1]))

        return ask


@on_a_loop
async def test_each_router_gets_its_orders_where_its_handle_says() -> None:
    called, box, order = Called(), Mailbox(), Order(1, 1)
    port = AllRouters(called)  # type: ignore[arg-type]
    update = RouterUpdate(replicas=(), epochs={}, current=0)

    def all_of(name: str, handle: Any) -> list[Any]:
        return [
            port.declare(name, handle, Desired(routers={"router-0": object()})),
            port.sync(order, name, handle, update),
            port.stage(order, name, handle, Candidate(id="l/gate", counter=1)),
            port.unload(order, name, handle, "l/gate", "v1"),
        ]

    for work in all_of("router-0", "an actor"):
        await work
    methods = ["declare", "sync", "stage", "unload"]
    assert called.asked == [(method, "router-0") for method in methods]
    waiting = [asyncio.ensure_future(work) for work in all_of("attached-1", box)]
    await settle()
    letters = await box.fetch({}, (), 0.0)
    assert [letter.method for letter in letters] == methods
    assert letters[0].arguments[0].routers == {}
    assert letters[1].arguments == (order, update)
    await box.fetch({letter.number: letter.method for letter in letters}, (), 0.0)
    assert (await asyncio.gather(*waiting))[1:3] == ["sync", "stage"]
    assert len(called.asked) == 4
