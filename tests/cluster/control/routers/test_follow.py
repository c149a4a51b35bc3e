"""Routers that answer late: they hold up nobody, and what went wrong with them is heard in the end."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.waiting import run_async, settle

from expertmesh.cluster.control.messages import Desired, RouterReport
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.control.replica_health import Health
from expertmesh.cluster.control.routers import follow
from expertmesh.experts.errors import Fenced, Unavailable

REPORT = RouterReport(incarnation="s", revision=1, epoch=0, oldest_pinned=0, gates=frozenset())


class Port:
    """Each call waits until the test answers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, asyncio.Future[RouterReport]]] = []

    async def sync(self, order: Any, router: str, handle: Any, update: Any) -> RouterReport:
        answer: asyncio.Future[RouterReport] = asyncio.get_running_loop().create_future()
        self.asked.append((router, answer))
        return await answer

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


async def performed(actions: Any) -> None:
    """Nothing follows."""


def routers(port: Port) -> follow.Routers:
    hands: Any = SimpleNamespace(
        order=lambda: None,
        perform=performed,
        changed_since=lambda *anything: False,
        transactions=SimpleNamespace(cluster_id="c"),
    )
    made = follow.Routers(port, Reconciler(), hands, Health(), dict, lambda: None)  # type: ignore[arg-type]
    made.expect(Desired(revision=1, routers={"a": None, "b": None}))
    return made


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], None]:
    monkeypatch.setattr(follow, "SLOW_SECONDS", 0.01)

    def run(steps: Callable[..., Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            port = Port()
            await steps(port, routers(port))

        run_async(main())

    return run


Story = Callable[[Callable[..., Coroutine[Any, Any, None]]], None]


def test_one_that_does_not_answer_is_asked_once_and_the_other_again(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(port: Port, made: follow.Routers) -> None:
        await made.tell()
        assert port.names() == ["a", "b"]
        port.asked[1][1].set_result(REPORT)
        await settle()
        port.asked[2][1].set_result(REPORT)  # its session is known now
        await settle()
        assert made.facts()["b"]["state"] == "ready"
        monkeypatch.setattr(follow, "SLOW_SECONDS", 1000.0)  # whoever is known to be slow is not waited for again
        telling = asyncio.ensure_future(made.tell())
        await settle()
        port.asked[3][1].set_result(REPORT)
        await telling
        assert port.names() == ["a", "b", "b", "b"]
        for _, answer in port.asked:
            answer.cancel()

    story(steps)


@pytest.mark.parametrize("error", [Fenced("another controller has taken over"), ZeroDivisionError("a bug")])
def test_what_went_wrong_late_is_raised_by_the_next_turn(story: Story, error: Exception) -> None:
    async def steps(port: Port, made: follow.Routers) -> None:
        await made.tell()
        port.asked[0][1].set_exception(error)
        await settle()
        with pytest.raises(type(error)):
            await made.tell()

    story(steps)


@pytest.mark.parametrize("error", [Unavailable("it is restarting"), TimeoutError()])
def test_a_router_that_was_not_reached_in_the_end_is_no_bug_and_not_forgotten(
    story: Story, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def steps(port: Port, made: follow.Routers) -> None:
        await made.tell()
        port.asked[0][1].set_exception(error)
        await settle()
        await made.tell()
        assert port.names() == ["a", "b", "a"]
        port.asked.clear()
        gc.collect()

    with caplog.at_level(logging.ERROR, logger="asyncio"):
        story(steps)
        gc.collect()
    assert not caplog.records
