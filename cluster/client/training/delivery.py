"""Delivers the messages of a session: each update once and in order, to experts that are lost and come back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ....experts.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertFailed,
    ExpertMeshError,
    Unavailable,
    VersionGone,
)
from ....experts.training.ledger import OTHER_PASSES
from ....experts.wire import Frame, WireTensor
from ...rpc.swaps import SwapOutcome
from ...rpc.training import error_of
from .options import TrainingOptions
from .updates import Part, Updates

LEFT_OUT = (Unavailable, DeadlineExceeded, ExpertFailed, VersionGone)
"""What an expert that does not answer fails with."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
ROUTER_SECONDS = 60.0
"""How long at least a router is waited for: one that Ray starts again takes some seconds."""

MOST_ROUNDS = 1000
"""How often one message is repeated at most, while experts are lost again and again as they catch up."""


class Connection(Protocol):
    """What a session needs of the client, or attached router, that it was opened with."""

    def _training(
        self, method: str, meta: dict[str, Any], tensors: dict[str, WireTensor], timeout: float | None = None
    ) -> Frame: ...

    @property
    def swap(self) -> Callable[..., SwapOutcome]: ...

    @property
    def swap_progress(self) -> Callable[[str], dict[str, Any]]: ...

    @property
    def history(self) -> Callable[[str], list[dict[str, Any]]]: ...


class Delivery:
    """The messages of one session, of which `applied` steps are made and `durable` ones survive everything.

    `restored` tells of each expert that had lost steps, which were repeated; `left_out` counts answers given up.
    """

    def __init__(
        self, connection: Connection, session_id: str, generation: int, options: TrainingOptions, step: int
    ) -> None:
        self.applied = self.durable = step
        self._generation = generation
        self.restored: list[dict[str, Any]] = []
        self.left_out = 0
        self.updates = Updates()
        self._connection = connection
        self._session_id = session_id
        self._options = options

    def ask(
        self, meta: dict[str, Any], parts: Sequence[Part], tensors: dict[str, WireTensor], *, may_leave: bool = True
    ) -> tuple[Frame, dict[str, ExpertMeshError]]:
        """Ask until every expert has answered, or its error is final; the errors of those that are left out.

        An expert that lacks updates is given them first: then all are asked again, for whom a repetition changes
        nothing. Raises the first error of an expert that may not be left out.
        """
        leaving = may_leave and self._options.on_missing == "leave_out"
        pauses, rounds = self.pauses(), itertools.count()
        while next(rounds) < MOST_ROUNDS:
            frame = self.send(meta, parts, tensors)
            outcomes = [dict(outcome) for outcome in frame.meta["outcomes"]]
            behind = [(part[0], out) for part, out in zip(parts, outcomes, strict=True) if "behind" in out]
            for id, outcome in behind:
                self.catch_up(id, outcome)
            if behind:
                continue
            errors = {part[0]: error_of(out) for part, out in zip(parts, outcomes, strict=True) if "error" in out}
            lost = [error for error in errors.values() if isinstance(error, (Unavailable, VersionGone))]
            if lost and (pause := next(pauses, None)) is not None:
                time.sleep(pause)
                continue
            for error in errors.values():
                if not leaving or not isinstance(error, LEFT_OUT):
                    raise error
                self.left_out += 1
            return frame, errors
        raise Unavailable("an expert of the session is lost again and again while it catches up; retry")

    def catch_up(self, id: str, outcome: Mapping[str, Any]) -> None:
        """Repeat to an expert the updates that it lacks. Raises DataLoss where they are not kept."""
        applied, passes = int(outcome["applied"]), int(outcome["passes"])
        if applied > self.applied or applied < self.durable:
            raise DataLoss(
                f"{id} has applied {applied} steps, but this session {self.applied}, of which {self.durable} are "
                "durable: resume it by its id, which goes back to what is durable"
            )
        lost = self.applied - applied
        if lost > 0:
            self.restored.append({"expert": id, "at_step": self.applied, "lost_steps": lost})
        if passes == OTHER_PASSES or passes > self.updates.passes(id, applied + 1):
            # It has computed a pass whose answer did not come, or came to nothing: it forgets those of this step.
            self.send({"op": "forget", "step": applied + 1}, [(id, "", 0, 0, 0)], {})
            passes = 0
        self._repeat(id, applied, passes)

    def _repeat(self, id: str, applied: int, passes: int) -> None:
        for update in self.updates.after(id, applied, passes):
            meta, tensors = update.message
            frame = self.send(meta, [update.parts[id]], tensors)
            outcome = dict(frame.meta["outcomes"][0])
            if "error" in outcome and not isinstance(error := error_of(outcome), LEFT_OUT):
                raise error
            if "ok" not in outcome:
                return  # it was lost again, or is further than it said: whoever asked asks again

    def send(self, meta: dict[str, Any], parts: Sequence[Part], tensors: dict[str, WireTensor]) -> Frame:
        """Send one message, again while no router answers, and return its answer."""
        fields = {**meta, "session": self._session_id, "durable": self.durable, "generation": self._generation}
        if parts:
            fields["parts"] = [list(part) for part in parts]
        pauses = pauses_of(max(ROUTER_SECONDS, self._options.seconds))
        while True:
            try:
                return self._connection._training("Train", fields, tensors)
            except Unavailable:
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)

    def pauses(self) -> Iterator[float]:
        """Pauses before asking again, in seconds, until the patience of the session ends."""
        return pauses_of(self._options.seconds)


def pauses_of(seconds: float) -> Iterator[float]:
    """Pauses that grow, as long as the next one ends within so many seconds from the first time that it is asked."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(number, 20))
        if time.monotonic() + pause > end:
            return
        yield pause
