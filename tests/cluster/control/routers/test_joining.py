"""Routers that join by themselves are told as the declared ones are, leave, and are given up when they are silent."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.waiting import on_a_loop, run_async, settle

from expertmesh.cluster.control.messages import Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.control.replica_health import Health
from expertmesh.cluster.control.routers import follow
from expertmesh.cluster.control.routers.follow import Routers
from expertmesh.experts.errors import Unavailable


class Port:
    """Routers that report under a session, or are silent where they have none."""

    def __init__(self, **sessions: str) -> None:
        self.sessions = sessions
        self.answers = asyncio.Event()
        self.answers.set()
        self.told: list[tuple[str, RouterUpdate]] = []

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        if router not in self.sessions:
            await self.answers.wait()
            raise Unavailable("it is silent")
        self.told.append((router, update))
        session = self.sessions[router]
        return RouterReport(incarnation=session, revision=1, epoch=1, oldest_pinned=1, gates=frozenset())

    def last(self, router: str) -> RouterUpdate:
        return next(update for name, update in reversed(self.told) if name == router)


def opened(port: Port) -> Routers:
    reconciler = Reconciler()
    reconciler.restore({1: {}}, ["a"])

    async def perform(actions: Any) -> None:
        pass

    executor: Any = SimpleNamespace(
        routers={},
        order=Order,
        changed_since=lambda *a: False,
        perform=perform,
        transactions=SimpleNamespace(cluster_id="c"),
    )
    routers = Routers(port, reconciler, executor, Health(), dict, lambda: None)  # type: ignore[arg-type]
    routers.expect(Desired(revision=1, routers={"a": "handle a"}))
    return routers


def silent(routers: Routers) -> None:
    """Time passes in which nobody is heard but a."""
    for now in range(0, 16, 2):
        routers.leases.tick(float(now))
        routers.leases.heard("a", "a1")


@on_a_loop
async def test_a_router_joins_beside_those_that_are_declared_and_leaves() -> None:
    port, gone = Port(a="a1", b="b1"), list[str]()
    routers = opened(port)
    await routers.join("b", "handle b", lambda: gone.append("b"), fresh=True)
    assert routers.handles == {"a": "handle a", "b": "handle b"}
    await routers.tell()
    assert {name: facts["state"] for name, facts in routers.facts().items()} == {"a": "ready", "b": "ready"}
    routers.expect(Desired(revision=1, routers={"a": "another handle"}))
    assert routers.handles == {"a": "another handle", "b": "handle b"}
    await routers.left("b")
    await routers.left("b")
    await routers.left("a")  # who is declared stays
    assert (gone, routers.handles.keys(), routers.facts().keys()) == (["b"], {"a"}, {"a"})


@on_a_loop
async def test_one_that_is_silent_holds_up_no_other_and_is_gone_after_its_lease() -> None:
    port, gone = Port(a="a1", b="b1"), list[str]()
    routers = opened(port)
    await routers.join("b", "handle b", lambda: gone.append("b"), fresh=True)
    await routers.tell()
    del port.sessions["b"]
    await routers.tell()
    assert routers.facts()["b"]["state"] == "restarting"
    silent(routers)
    await routers.leave()
    assert (gone, routers.handles.keys()) == (["b"], {"a"})
    assert routers.leases.given_up == {"b": "b1"}  # for replicas that do not know it yet
    await routers.leave()
    assert gone == ["b"]


@on_a_loop
async def test_one_that_was_given_up_joins_again_under_another_session() -> None:
    port = Port(a="a1", b="b1")
    routers = opened(port)
    await routers.join("b", "handle b", lambda: None, fresh=True)
    await routers.tell()
    silent(routers)
    await routers.leave()
    await routers.join("b", "another", lambda: None, fresh=False)
    await routers.tell()
    assert port.last("b").given_up == "b1"
    assert routers.leases.given_up == {"b": "b1"}
    port.sessions["b"] = "b2"
    await routers.tell()
    assert (port.last("b").session, routers.leases.given_up) == ("b2", {})
    await routers.left("b")
    silent(routers)
    assert routers.leases.given_up == {}


def test_one_may_leave_while_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What went wrong with telling it is heard all the same: asyncio complains of exceptions that nobody asked for."""
    monkeypatch.setattr(follow, "SLOW_SECONDS", 0.01)

    async def story() -> None:
        port = Port(a="a1")
        routers = opened(port)
        await routers.join("b", "handle b", lambda: None, fresh=True)
        port.answers.clear()
        await routers.tell()
        await routers.left("b")
        port.answers.set()
        await settle()
        await routers.tell()
        gc.collect()

    run_async(story())
