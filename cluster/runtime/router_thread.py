"""Runs a router on an event loop in its own thread, so that gate and combine never block the gateway.

Torch runs directly on that loop: handing each small step to another thread and back costs more than the step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from ...experts.errors import Unavailable
from ...router.request.forward import Router
from ...router.request.standing import TICK_SECONDS

END_SECONDS = 5.0
"""How long the tasks of a loop that has stopped may take to end."""
P = ParamSpec("P")
T = TypeVar("T")


class RouterThread:
    """Runs a router; all changes to it go through `run` or `call`."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="expertmesh-router", daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the router's loop; cancelling the caller cancels it. Raises Unavailable after `close`."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        with self._lock:  # or work would be handed to a loop that never runs again, and be waited for without end
            if self._closed:
                work.close()
                raise Unavailable("the router has stopped; retry")
            result = elsewhere(self.loop, work)
        return await result

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the router's loop."""

        async def called() -> T:
            return function(*args, **kwargs)

        return await self.run(called())

    def close(self) -> None:
        """Disconnect from every replica and end the thread; idempotent."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end)
            self._thread.join()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._tick)
        try:
            self.loop.run_forever()
        finally:
            with self._lock:
                self._closed = True
            end_tasks(self.loop)
            self.loop.close()

    def _tick(self) -> None:
        self.router.standing.tick()
        self.loop.call_later(TICK_SECONDS, self._tick)

    def _end(self) -> None:
        self.router.transport.close()
        self.loop.stop()


def elsewhere(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Run a coroutine on another event loop; cancelling the future here cancels it there.

    Raises Unavailable if that loop is closed.
    """
    try:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except RuntimeError:
        work.close()
        raise Unavailable("what was asked has stopped; retry") from None


def end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks of a loop that has stopped, with what was handed to it last, and let them end."""
    loop.run_until_complete(_end_others())


async def _end_others() -> None:
    await asyncio.sleep(0)  # what was handed over becomes a task
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        ended, _ = await asyncio.wait(tasks, timeout=END_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()  # or it would be logged as never retrieved
