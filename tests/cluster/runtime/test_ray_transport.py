"""What becomes of a call whose actor ends: it is told apart from one that could not be sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.waiting import run_async, until

from expertmesh.cluster.runtime.ray_environment import load_backend
from expertmesh.experts.errors import ExpertFailed, Unavailable
from expertmesh.experts.protocol import ExpertCall, Part
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.transport import Died

pytestmark = pytest.mark.ray
REPLICA = Replica("l/e#0", ("l/e",), "1", frozenset({("l/e", "v1-a")}), READY)
CALL = ExpertCall(1, (Part("l/e", "v1-a", 0, 1),), torch.ones(1, 2))


def test_a_call_under_way_in_an_actor_that_ends_has_died_with_it() -> None:
    load_backend(None)  # as a private Ray would have it: with its token, before Ray is imported
    from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

    from expertmesh.cluster.runtime.ray_transport import RayTransport

    async def told(error: Exception | None) -> Any:
        async def remote(call: Any) -> None:
            raise error or AssertionError

        def called(call: Any, router: str) -> Awaitable[None]:
            return asyncio.ensure_future(remote(call))

        transport, replies = RayTransport(), []
        if error is not None:
            transport.handles = {"l/e#0": SimpleNamespace(compute=SimpleNamespace(remote=called))}
        transport.send(REPLICA, CALL, replies.append)
        await until(lambda: replies)
        return replies[0]

    async def main() -> None:
        for died in (ActorDiedError(), ActorUnavailableError("Socket closed", None)):
            assert isinstance(await told(died), Died)
        assert isinstance(await told(ObjectLostError("0" * 56, None, "")), Unavailable)
        assert isinstance(await told(None), Unavailable)  # it was never sent
        failed = RayTaskError("compute", "", ExpertFailed("l/e raised"))
        assert isinstance(await told(failed), ExpertFailed)

    run_async(main())
