"""A router that was given up answers nothing: neither what it is asked then, nor what it was computing, nor a pin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.waiting import run_async, until

from expertmesh.experts.errors import RouterUnavailable
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

X = torch.ones(2, 3)
MAY_END = threading.Event()
CALLS: list[int] = []


def slow_abs(x: torch.Tensor) -> torch.Tensor:
    """Waits for the test."""
    CALLS.append(len(x))
    assert MAY_END.wait(20)
    return x.abs()


@asynccontextmanager
async def confirmed() -> AsyncIterator[RouterInProcess]:
    CALLS.clear()
    MAY_END.set()
    async with RouterInProcess(Layer("l", gates.Fixed([1.0]), {"a": Expert.from_function(slow_abs)})) as mesh:
        mesh.router.standing.required = True
        mesh.router.standing.confirmed(mesh.router.standing.session)
        yield mesh


def test_it_refuses_without_computing_until_its_next_session_is_confirmed() -> None:
    async def main() -> None:
        async with confirmed() as mesh:
            standing = mesh.router.standing
            assert mesh.router.serves()
            standing.lose(standing.session)
            with pytest.raises(RouterUnavailable, match="given up"):
                await mesh.ask(X)
            assert CALLS == []
            assert not mesh.router.serves()
            standing.confirmed(standing.session)
            assert torch.equal((await mesh.ask(X)).output, X)
            assert mesh.router.serves()
            await mesh.at_rest()

    run_async(main())


def test_what_it_was_computing_does_not_leave_it() -> None:
    async def main() -> None:
        async with confirmed() as mesh:
            MAY_END.clear()
            asked = asyncio.ensure_future(mesh.ask(X))
            await until(lambda: CALLS)
            mesh.router.standing.lose(mesh.router.standing.session)
            MAY_END.set()
            with pytest.raises(RouterUnavailable, match="given up"):
                await asked
            await mesh.at_rest()

    run_async(main())


def test_it_gives_no_lease_on_an_epoch_that_may_have_been_replaced() -> None:
    async def main() -> None:
        async with confirmed() as mesh:
            leases, standing = mesh.router.leases, mesh.router.standing
            standing.lose(standing.session)
            with pytest.raises(RouterUnavailable, match="given up"):
                leases.lease(10.0)
            assert len(leases) == 0
            standing.confirmed(standing.session)
            lease, epoch, _ = leases.lease(10.0)
            assert epoch.number == 1
            assert leases.give_back(lease)

    run_async(main())
