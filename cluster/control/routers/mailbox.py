"""A mailbox for who is no actor, a router in a caller's process or the owner: orders wait here until they are fetched.

Such a process cannot be called, so it polls. Every poll names the orders that it holds and brings the
answers that are ready; it gets the orders that it does not hold. So a poll, or its reply, may be lost, late or doubled:
an order is handed out again until its answer is here, and an answer counts once.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ....experts.errors import ExpertMeshError, Unavailable


@dataclass(frozen=True)
class Letter:
    """One order: the method of the router to call, and its arguments. Its number is unique in its mailbox."""

    number: int
    method: str
    arguments: tuple[Any, ...] = field(default=(), repr=False)


class Mailbox:
    """The orders for one process, on the event loop of the controller.

    `id` tells it from the mailboxes of earlier controllers, whose orders had numbers, too.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Letter, asyncio.Future[Any]]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Leave an order, and wait for its answer; who stops waiting takes it back. Raises the error of the router.

        Raises Unavailable once the mailbox is closed.
        """
        self._check_open()
        letter = Letter(next(self._numbers), method, arguments)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[letter.number] = letter, answer
        self._wake()
        try:
            return await answer
        finally:
            del self._waiting[letter.number]

    async def fetch(self, answers: Mapping[int, Any], held: Collection[int], seconds: float) -> tuple[Letter, ...]:
        """Take the answers, results or errors by number; returns the orders that are not `held`, in their order.

        Waits for one for at most `seconds`. Raises Unavailable once the mailbox is closed.
        """
        for number, answer in answers.items():
            self._take(number, answer)
        end = asyncio.get_running_loop().time() + seconds
        while True:
            self._check_open()
            letters = tuple(
                letter for letter, answer in self._waiting.values() if not answer.done() and letter.number not in held
            )
            left = end - asyncio.get_running_loop().time()
            if letters or left <= 0:
                return letters
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except (asyncio.TimeoutError, TimeoutError):
                return ()

    def close(self) -> None:
        """Fail what waits for the router, and refuse its polls; idempotent."""
        self._closed = True
        for _, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the router has left"))
        self._wake()

    def _take(self, number: int, answer: Any) -> None:
        _, waiting = self._waiting.get(number, (None, None))
        if waiting is None or waiting.done():  # nobody waits any more, or it came before
            return
        if isinstance(answer, ExpertMeshError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the controller has given this router up; it has to join again")
