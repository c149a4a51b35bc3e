"""What clients ask of the owner: fetched from the controller, carried out once, and answered until that is heard."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from ...experts.errors import ExpertMeshError
from ..config.layer_changes import LayersRequest
from ..control.messages import ScaleRequest
from ..runtime.backend import Backend

REMEMBERED = 1000
"""How many changes are remembered, so that one that is asked for again is not made again."""

ChangeRequest: TypeAlias = ScaleRequest | LayersRequest
log = logging.getLogger(__name__)


class Asked:
    """The changes that were asked for. `carry_out` makes one; it may block, and is called in a thread of its own."""

    def __init__(self, carry_out: Callable[[ChangeRequest], dict[str, Any]]) -> None:
        self._carry_out = carry_out
        self._outcomes: dict[str, Future[dict[str, Any]]] = {}
        self._answers: dict[int, Any] = {}

    def follow(self, backend: Backend) -> None:
        """Hand over the answers that are ready, and begin what is new. Raises Unavailable; then they are kept."""
        letters = backend.changes(self._answers)
        self._answers = {}
        for letter in letters:
            outcome = self._outcome(letter.arguments[0])
            if outcome.done():
                self._answers[letter.number] = outcome.exception() or outcome.result()

    def _outcome(self, request: ChangeRequest) -> Future[dict[str, Any]]:
        known = self._outcomes.get(request.change_id)
        if known is not None:
            return known
        begun = self._outcomes[request.change_id] = Future()
        threading.Thread(target=self._run, args=(request, begun), name="expertmesh-change", daemon=True).start()
        if len(self._outcomes) > REMEMBERED:
            del self._outcomes[next(iter(self._outcomes))]
        return begun

    def _run(self, request: ChangeRequest, outcome: Future[dict[str, Any]]) -> None:
        try:
            outcome.set_result(self._carry_out(request))
        except ExpertMeshError as error:
            outcome.set_exception(error)
        except Exception as error:  # a bug of ours, or Ray's: whoever asked has to hear of it
            log.exception("a change could not be carried out")
            outcome.set_exception(ExpertMeshError(f"the change failed with {type(error).__name__}; see the log"))
