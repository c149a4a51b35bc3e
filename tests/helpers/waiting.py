"""Waiting in tests, always with a deadline: for a coroutine, for a condition, for what an event loop has yet to run."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any


def run_async(main: Coroutine[Any, Any, None], seconds: float = 100.0) -> None:
    """Run a test's coroutine; fails when it hangs, and when a callback or a forgotten task raised meanwhile."""

    async def guarded() -> None:
        broken: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
        await main
        await settle()
        assert not broken, broken

    asyncio.run(asyncio.wait_for(guarded(), seconds))


def on_a_loop(story: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine function without arguments, run by `run_async`."""

    @functools.wraps(story)
    def test() -> None:
        run_async(story())

    return test


async def settle() -> None:
    """Let everything run that can run without anything from outside."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something holds; `run_async` ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.001)


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that other processes do; fails with `what` when it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        threading.Event().wait(0.05)
