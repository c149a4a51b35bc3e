"""What a controller tells a router decides whether it answers: told as a controller does it, in this process."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.waiting import run_async

from expertmesh.cluster.control.messages import Candidate, Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.gateway.gateway import GatewaySettings
from expertmesh.cluster.runtime.router_process import RouterService, ServiceSettings
from expertmesh.experts.errors import RouterUnavailable
from expertmesh.experts.protocol import CallOptions
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request.answer import ForwardReply, ForwardRequest

X = torch.ones(2, 3)


class Told:
    """A router's service, and what a controller tells it; the gate of epoch n has the counter n."""

    def __init__(self, folder: Path) -> None:
        self.mesh = RouterInProcess(Layer("l", gates.Fixed([1.0]), {"a": Expert("torch:abs")}))
        settings: dict[str, Any] = {"max_rows_in_flight": 65_536, "gateway": GatewaySettings()}
        told = ServiceSettings(name="test", metrics_port=None, tokens=(), state_dir=str(folder), **settings)
        self.service = RouterService(told, self.mesh.local, None)  # type: ignore[arg-type]
        self.orders = itertools.count(1)
        self.epochs: dict[int, dict[str, str]] = {}

    async def gate(self, counter: int) -> None:
        """Have the gate of an epoch loaded."""
        layer = self.mesh.layer
        candidate = Candidate(id=layer.gate_id, counter=counter, gate=layer.gate)
        receipt = await self.service.stage(Order(1, next(self.orders)), candidate)
        self.epochs[counter] = self.mesh.versions | {layer.gate_id: receipt.version}

    async def sync(self, epoch: int, session: str, given_up: str = "") -> RouterReport:
        replicas = tuple(self.mesh.replica(name) for name in self.mesh.hosts)
        versions = self.epochs.get(epoch, self.mesh.versions | {self.mesh.layer.gate_id: "v9-000000000000"})
        update = RouterUpdate(
            replicas=replicas, epochs={epoch: versions}, current=epoch, session=session, given_up=given_up
        )
        return await self.service.sync(Order(1, next(self.orders)), update)

    async def started(self) -> str:
        """Bring it to epoch 1; returns its session."""
        await self.service.declare(Desired(revision=1, layers={"l": self.mesh.layer}))
        await self.gate(1)
        session = (await self.sync(1, "")).incarnation
        with pytest.raises(RouterUnavailable, match="has just started"):
            await self.ask()
        assert (await self.sync(1, session)).incarnation == session
        assert (await self.ask()).summary.epoch == 1
        return session

    async def ask(self) -> ForwardReply:
        asked = ForwardRequest(X, CallOptions(layer="l"), 20.0, None, None, None)
        return await self.service._thread.run(self.service.router.forward(asked))


def told(folder: Path, story: Any) -> None:
    async def main() -> None:
        made = Told(folder)
        try:
            await story(made)
        finally:
            await asyncio.to_thread(made.service.close)

    run_async(main())


def test_a_router_that_was_given_up_answers_again_only_with_the_epoch_of_now(tmp_path: Path) -> None:
    """Its session is known again before the gate of the current epoch is loaded; until it is, there is no answer."""

    async def story(made: Told) -> None:
        session = await made.started()
        back = (await made.sync(2, "", given_up=session)).incarnation
        assert back != session
        assert (await made.sync(2, back)).epoch == 1
        with pytest.raises(RouterUnavailable, match="given up"):
            await made.ask()
        await made.gate(2)
        assert (await made.sync(2, back)).epoch == 2
        assert (await made.ask()).summary.epoch == 2

    told(tmp_path, story)


def test_a_router_that_keeps_its_standing_serves_its_epoch_until_the_next_one_is_loaded(tmp_path: Path) -> None:
    async def story(made: Told) -> None:
        session = await made.started()
        assert (await made.sync(2, session)).epoch == 1
        assert (await made.ask()).summary.epoch == 1

    told(tmp_path, story)


def test_a_router_that_is_given_up_before_it_was_confirmed_comes_back(tmp_path: Path) -> None:
    async def story(made: Told) -> None:
        session = await made.started()
        second = (await made.sync(1, "", given_up=session)).incarnation
        third = (await made.sync(1, "", given_up=second)).incarnation
        assert len({session, second, third}) == 3
        await made.sync(1, second)
        with pytest.raises(RouterUnavailable, match="given up"):
            await made.ask()
        await made.sync(1, third)
        assert (await made.ask()).summary.epoch == 1

    told(tmp_path, story)
