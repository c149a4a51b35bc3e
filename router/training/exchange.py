"""Sends messages of training to replicas, few at a time to each, and waits for their answers."""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...experts.errors import DeadlineExceeded, ExpertMeshError, Unavailable
from ...experts.protocol import TrainCall, TrainReply
from ..fanout.replica_view import Replica, View
from ..fanout.transport import Died, Transport

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

FIRST_ATTEMPT = 1 << 40
"""Attempts are counted from here, apart from those of the fan-out on the same connections."""
IN_FLIGHT = 2
"""How many messages of training are in flight to a replica, which takes four of a router, with those of requests."""

Part = tuple[str, str, int, int, int]
"""(expert, version, start, stop, number), as `experts/training/desk.py` has it."""


class Exchange:
    """The messages of training of one router. Belongs to its event loop."""

    def __init__(self, transport: Transport, view: View) -> None:
        self._transport = transport
        self._view = view
        self._attempts = itertools.count(FIRST_ATTEMPT)
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(IN_FLIGHT))

    async def ask(
        self,
        replica: Replica,
        meta: Mapping[str, Any],
        parts: Sequence[Part],
        tensors: Mapping[str, Tensor],
        timeout: float = math.inf,
    ) -> TrainReply:
        """Have a replica carry out an operation. Raises Unavailable if it is lost, DeadlineExceeded, or its error."""
        fields = {**meta, "parts": [list(part) for part in parts]}
        call = TrainCall(next(self._attempts), fields, tensors, timeout)
        answer: asyncio.Future[TrainReply | ExpertMeshError | Died] = asyncio.get_running_loop().create_future()
        try:
            async with deadline(timeout if math.isfinite(timeout) else None), self._turns[replica.id]:
                cancel = self._transport.train(replica, call, lambda r: None if answer.done() else answer.set_result(r))
                try:
                    found = await answer
                finally:
                    if not answer.done() or answer.cancelled():
                        cancel()
        except (asyncio.TimeoutError, TimeoutError):
            raise DeadlineExceeded(f"{replica.id} did not answer within {timeout:.3g} s") from None
        if isinstance(found, Died):
            self._view.failed(replica.id)
            raise Unavailable(f"{replica.id} was lost with a message of training; retry")
        if isinstance(found, ExpertMeshError):
            raise found
        return found
