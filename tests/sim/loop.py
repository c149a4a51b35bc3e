"""The event loop of one process in virtual time. Once the process is killed, nothing that waits in it runs again."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.clock import Clock
    from sim.network import Process

Callback = Callable[..., Any]


class Killed(BaseException):
    """Raised where a process is killed between two of its steps: no code of the product catches it."""


class Loop(asyncio.AbstractEventLoop):
    """What asyncio needs of an event loop, on a simulated clock.

    Threads are simulated, too: what they do happens at one moment, some time after it was asked for.
    """

    def __init__(self, clock: Clock, process: Process, failed: Callable[[BaseException], None]) -> None:
        self._clock = clock
        self._process = process
        self._failed = failed
        self._tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self._clock.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return not self._process.alive

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, **options)
        self._tasks.append(task)
        return task

    def call_soon(self, callback: Callback, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._schedule(0.0, handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._schedule(max(0.0, when - self.time()), handle)
        return handle

    def run_in_executor(self, executor: Any, func: Callback, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        self._clock.after(self._clock.between(0.002, 0.06), self._process.run, lambda: self._work(future, func, args))
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self._process.alive and error is not None and not isinstance(error, Killed):
            self._failed(error)

    def close(self) -> None:
        """Take back the memory of what still waits, when the world has ended. Nothing of it must be heard any more."""
        assert not self._process.alive
        with warnings.catch_warnings():  # what never began was "never awaited"
            warnings.simplefilter("ignore")
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with suppress(RuntimeError, Killed):
                        task.get_coro().close()  # type: ignore[union-attr]
            self._tasks.clear()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays on the clock, and does nothing there."""

    def _schedule(self, delay: float, handle: asyncio.Handle) -> None:
        if self._process.alive:
            self._clock.after(delay, self._run, handle)

    def _run(self, handle: asyncio.Handle) -> None:
        self._process.run(lambda: self._ran(handle))

    def _ran(self, handle: asyncio.Handle) -> None:
        if self._process.alive and not handle.cancelled():
            asyncio._set_running_loop(self)
            try:
                handle._run()
            finally:
                asyncio._set_running_loop(None)

    def _work(self, future: asyncio.Future[Any], func: Callback, args: tuple[Any, ...]) -> None:
        if not self._process.alive:
            return
        try:
            settle: Callback = future.set_result
            outcome = func(*args)
        except Killed:
            return
        except Exception as error:  # noqa: BLE001 - whoever waits for the thread gets it
            settle, outcome = future.set_exception, error
        late = self._clock.between(0.0, 0.8 if self._clock.chance(0.1) else 0.02)  # the machine is busy
        self._schedule(late, asyncio.Handle(_settled, (future, settle, outcome), self))


def _settled(future: asyncio.Future[Any], settle: Callback, outcome: Any) -> None:
    if not future.done():
        settle(outcome)
