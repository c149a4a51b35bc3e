"""A request as `router/request` and `router/fanout` carry it out: pin, gate, fan out, retry, combine, answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from sim.router import GATE

from expertmesh.cluster.channel.refused import identity
from expertmesh.experts.errors import ExpertMeshError, Fenced, Unavailable, VersionGone
from expertmesh.router.epochs.epochs import Epoch

if TYPE_CHECKING:
    from sim.router import Router

EPOCH_ATTEMPTS = 2
MAX_ATTEMPTS = 3
MESSAGE_TIMEOUT = 3.0
Done = Callable[["Request"], None]


class Request:
    """One request with several rounds of rows; `answers` are the (id, version) that took part, as computed.

    Under a `lease`, or with the number of an `old` epoch, it is asked of that very epoch, and never starts again on
    another.
    """

    def __init__(self, router: Router, number: int, rounds: int, done: Done, lease: int = 0, old: int = 0) -> None:
        self.router = router
        self.number = number
        self.lease = lease
        self.old = old
        self.answers: list[tuple[str, str]] = []
        self.error: ExpertMeshError | None = None
        self.epoch: Epoch | None = None
        self.gone = 0
        self.ended = False
        self.acknowledged = router.world.checker.acknowledged
        self._rounds = rounds
        self._left = rounds
        self._attempt = 0
        self._waiting: set[str] = set()
        self._done = done

    def start(self) -> None:
        """Pin an epoch and send the first round."""
        self.router.requests.add(self)
        try:
            self.router.standing.check()
        except ExpertMeshError as error:
            self.fail(error)
            return
        if not self.router.serves:
            self.fail(Unavailable("the router is not ready"))
        else:
            self._begin()

    def fail(self, error: ExpertMeshError) -> None:
        """End without an answer."""
        self.error = error
        self._end()

    def _begin(self) -> None:
        self._attempt += 1
        self._left, self.answers = self._rounds, []
        self.epoch = self.router.leases[self.lease] if self.lease else self.router.epochs.pin(self.old or None)
        self.router.world.checker.pinned(self)
        self._round()

    def _round(self) -> None:
        """Gate the rows of one round: the choice depends on the gate's version, as it does in truth."""
        assert self.epoch is not None
        version = self.epoch.versions[GATE]
        self.answers.append((GATE, version))
        experts = self.router.world.experts
        draw = random.Random(f"{version} {self.number} {self._left}")
        chosen = draw.sample(experts, min(2, len(experts)))
        self._waiting = set(chosen)
        attempt = self._attempt
        for expert in chosen:
            self._send(expert, attempt, set(), 0)

    def _send(self, expert: str, attempt: int, tried: set[str], sent: int) -> None:
        if self.ended or attempt != self._attempt or self.epoch is None:
            return
        version = self.epoch.versions[expert]
        try:
            name = self.router.view.choose([(expert, version)], exclude=tried).id
        except ExpertMeshError as error:
            self._failed(error)
            return
        tried.add(name)
        session = self.router.session
        self.router.view.sent(name, 1)
        self.router.world.network.call(
            self.router,
            name,
            "compute",
            (identity(self.router.name, session), expert, version),
            lambda result: self._replied(expert, attempt, tried, sent + 1, name, session, result),
            MESSAGE_TIMEOUT,
        )

    def _replied(
        self, expert: str, attempt: int, tried: set[str], sent: int, name: str, session: str, result: object
    ) -> None:
        self.router.view.sent(name, -1)
        if result is None:
            self.router.view.failed(name)
        if self.ended or attempt != self._attempt:
            return
        if isinstance(result, str):
            self._answered(expert, result)
        elif isinstance(result, Fenced):
            self.router.standing.lose(session)
            self._failed(Unavailable("this router was given up"))
        else:
            self.gone += isinstance(result, VersionGone)
            if sent >= MAX_ATTEMPTS:
                self._failed(Unavailable(f"{expert} did not answer"))
            else:
                self._send(expert, attempt, tried, sent)

    def _answered(self, expert: str, version: str) -> None:
        self.answers.append((expert, version))
        self._waiting.discard(expert)
        if self._waiting:
            return
        self._left -= 1
        if self._left:
            self._round()
        else:
            self._complete()

    def _complete(self) -> None:
        try:
            self.router.standing.check()
        except ExpertMeshError as error:
            self.fail(error)
        else:
            self._end()

    def _failed(self, error: ExpertMeshError) -> None:
        """Where a version is gone everywhere, start again from the gate on the current epoch."""
        fixed = self.lease or self.old
        if isinstance(error, VersionGone) and self._attempt < EPOCH_ATTEMPTS and not fixed:
            self._unpin()
            self._begin()
        else:
            self.fail(error)

    def _unpin(self) -> None:
        if self.epoch is not None and not self.lease:
            self.router.epochs.unpin(self.epoch)

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.router.requests.discard(self)
        self._unpin()
        self._done(self)
