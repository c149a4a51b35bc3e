"""What a controller tells a router decides whether it answers: told as a controller does it, in this process."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.waiting import run_async, settle

from expertmesh.cluster.channel.replica_end import ChannelServer, socket_path
from expertmesh.cluster.channel.router_end import ChannelTransport
from expertmesh.cluster.control.messages import Candidate, Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.gateway.gateway import GatewaySettings
from expertmesh.cluster.runtime.router_process import RouterService, ServiceSettings
from expertmesh.experts.errors import RouterUnavailable, Unavailable
from expertmesh.experts.protocol import CallOptions
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request.answer import ForwardReply, ForwardRequest

X = torch.ones(2, 3)
SECRET = b"a secret of thirty-two bytes, ok"
CALLS: list[int] = []


def counted(x: torch.Tensor) -> torch.Tensor:
    CALLS.append(len(x))
    return x.abs()


class Told:
    """A router's service, and what a controller tells it; the gate of epoch n has the counter n."""

    def __init__(self, folder: Path, *, sockets: bool = False) -> None:
        CALLS.clear()
        self.mesh = RouterInProcess(Layer("l", gates.Fixed([1.0]), {"a": Expert.from_function(counted)}))
        ((self.id, host),) = self.mesh.hosts.items()
        self.server = ChannelServer(host, self.id, SECRET)
        self.server.listen_unix(socket_path(folder, "r", host.incarnation))
        transport = ChannelTransport(SECRET) if sockets else self.mesh.local
        settings: dict[str, Any] = {"max_rows_in_flight": 65_536, "gateway": GatewaySettings()}
        told = ServiceSettings(name="test", metrics_port=None, tokens=(), state_dir=str(folder), **settings)
        self.service = RouterService(told, transport, None)  # type: ignore[arg-type]
        self.orders = itertools.count(1)
        self.epochs: dict[int, dict[str, str]] = {}

    async def gate(self, counter: int) -> None:
        """Have the gate of an epoch loaded."""
        layer = self.mesh.layer
        candidate = Candidate(id=layer.gate_id, counter=counter, gate=layer.gate)
        receipt = await self.service.stage(Order(1, next(self.orders)), candidate)
        made_of = Candidate(id=layer.layer_id, counter=1, layer=layer)
        layers = await self.service.stage(Order(1, next(self.orders)), made_of)
        named = {layer.gate_id: receipt.version, layer.layer_id: layers.version}
        self.epochs[counter] = self.mesh.versions | named

    async def sync(self, epoch: int, session: str, given_up: str = "") -> RouterReport:
        replicas = (self.mesh.replica(self.id, address=self.server.address),)
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

    def close(self) -> None:
        self.service.close()
        self.server.close()


def told(folder: Path, story: Any, **options: Any) -> None:
    async def main() -> None:
        made = Told(folder, **options)
        try:
            await story(made)
        finally:
            await asyncio.to_thread(made.close)

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


def test_a_frozen_router_that_replicas_serve_no_more_computes_nothing_when_it_wakes(tmp_path: Path) -> None:
    """Over sockets: it is frozen with a request before it and one that comes, and given up; it serves again later."""

    async def story(made: Told) -> None:
        session = await made.started()
        assert CALLS == [2]
        stands, wake = threading.Event(), threading.Event()

        def freeze() -> None:
            stands.set()
            assert wake.wait(20)

        made.service.loop.call_soon_threadsafe(freeze)
        assert await asyncio.to_thread(stands.wait, 20)
        asked = [asyncio.ensure_future(made.ask()) for _ in range(3)]
        await settle()
        made.server.refuse({"router-0": session})
        wake.set()
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(answer, Unavailable)
        assert CALLS == [2]
        back = (await made.sync(1, "", given_up=session)).incarnation
        assert back != session
        with pytest.raises(RouterUnavailable, match="given up"):
            await made.ask()
        await made.sync(1, back)
        assert torch.equal((await made.ask()).output, X)
        assert CALLS == [2, 2]

    told(tmp_path, story, sockets=True)
