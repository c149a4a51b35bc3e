"""The way of a request is a straight line: ten files in the order of ARCHITECTURE.md, and helpers that they call."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers.router_in_process import RouterInProcess
from helpers.waiting import eventually

from expertmesh.cluster.channel.core_slots import CoreSlots
from expertmesh.cluster.channel.replica_end import ChannelServer, socket_path
from expertmesh.cluster.channel.router_end import ChannelTransport
from expertmesh.cluster.client.client import Client
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.gateway.gateway import Gateway, GatewaySettings
from expertmesh.cluster.gateway.grpc_server import GrpcServer
from expertmesh.cluster.machine.tokens import new_token, token_digest
from expertmesh.cluster.rpc.methods import Role
from expertmesh.cluster.runtime.router_thread import RouterThread
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.fanout.replica_view import Replica
from expertmesh.router.mixture.layer import Layer

ROOT = Path(__file__).parents[2]
SECRET = b"a secret of thirty-two bytes, ok"
MOST = 10
ADAPTERS = (  # thin shells between two of the ten: gRPC, and the way to the router's event loop
    "cluster/gateway/grpc_server.py", "cluster/runtime/router_thread.py",
)  # fmt: skip
HELPERS = (  # what the ten call, and what returns to them
    "cluster/client/arrays.py", "cluster/client/routers/balance.py", "cluster/client/routers/channels.py",
    "cluster/client/half_precision.py", "cluster/client/methods.py", "cluster/client/reply.py",
    "cluster/client/requests.py", "cluster/client/retry.py", "cluster/client/routers/watch.py",
    "cluster/client/sending.py", "cluster/rpc/methods.py", "cluster/gateway/streams.py",
    "cluster/rpc/status.py", "cluster/rpc/swaps.py", "cluster/gateway/authorise.py", "cluster/gateway/frames.py",
    "cluster/machine/tokens.py",
    "cluster/channel/core_slots.py", "cluster/channel/framed_socket.py", "cluster/channel/messages.py",
    "cluster/channel/refused.py",
    "router/epochs/epochs.py", "router/epochs/pinning.py", "router/fanout/answers.py", "router/fanout/batch.py",
    "router/fanout/fair_queue.py", "router/fanout/lane.py", "router/fanout/lateness.py", "router/fanout/message.py",
    "router/fanout/replica_view.py", "router/fanout/telemetry.py",
    "router/fanout/work.py", "router/gates/*.py", "router/mixture/combine.py", "router/mixture/dispatch.py",
    "router/mixture/layer.py", "router/mixture/missing.py", "router/mixture/ordered_sum.py",
    "router/request/admission.py", "router/request/batch_timing.py", "router/request/options.py",
    "router/request/standing.py",
    "experts/construct/factory.py", "experts/construct/returned.py", "experts/protocol.py", "experts/spec.py",
    "experts/sums/bag_sum.py",
    "experts/sums/device_rows.py", "experts/sums/partial_sum.py", "experts/tensors.py", "experts/wire.py",
)  # fmt: skip


def spine() -> list[str]:
    """The files of the numbered list in ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## Life of a request", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)


def strangers(entered: Iterable[str], listed: Iterable[str]) -> list[str]:
    """The files that are neither in the list nor helpers."""
    known = (*listed, *ADAPTERS, *HELPERS)
    return [name for name in entered if not any(fnmatch(name, pattern) for pattern in known)]


class Recorder:
    """The files of ours that are entered, in the order of their first entry, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.entered: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.on and event == "call":
            path = Path(frame.f_code.co_filename).resolve()
            if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("cluster", "router", "experts"):
                self.entered.setdefault(path.relative_to(ROOT).as_posix())


@contextmanager
def profiled() -> Iterator[Recorder]:
    """Record this thread and every thread that starts meanwhile."""
    recorder, before = Recorder(), sys.getprofile()
    sys.setprofile(recorder)
    threading.setprofile(recorder)
    try:
        yield recorder
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(before)


class Cluster:
    """A gateway on a loop of its own, a router in its thread, and replicas behind channels: all in this process."""

    def __init__(self, folder: Path) -> None:
        experts = {name: Expert("torch:sin", pack="p" if name in ("a", "b") else None) for name in ("a", "b", "c", "d")}
        self.mesh = RouterInProcess(Layer("l", gates.TopK(3, 4, 2), experts), ChannelTransport(SECRET))
        self.servers: dict[str, ChannelServer] = {}
        for name, host in self.mesh.hosts.items():
            self.servers[name] = ChannelServer(host, name, SECRET, CoreSlots(folder, 2))
            self.servers[name].listen_unix(socket_path(folder, name, host.incarnation))
        self.thread = RouterThread(self.mesh.router)
        self.token = new_token()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.server: GrpcServer = asyncio.run_coroutine_threadsafe(self.started(), self.loop).result(30)

    async def started(self) -> GrpcServer:
        tokens = TokenTable()
        tokens.add(token_digest(self.token), Role.READER)

        async def status() -> dict[str, Any]:
            return {}

        await self.thread.run(self.mesh.__aenter__())
        await self.thread.call(self.mesh.report, *map(self.replica, self.servers))
        gateway = Gateway(self.mesh.router, tokens, GatewaySettings(), status, run=self.thread.run)
        server = GrpcServer(gateway)
        await server.start()
        return server

    def replica(self, name: str) -> Replica:
        return self.mesh.replica(name, address=self.servers[name].address)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.close()
        for server in self.servers.values():
            server.close()


def test_a_request_enters_the_ten_files_of_the_list_and_their_helpers(tmp_path: Path) -> None:
    with profiled() as recorder:
        cluster = Cluster(tmp_path)
        try:
            with Client(f"127.0.0.1:{cluster.server.port}", token=cluster.token) as client:
                x = np.ones((5, 3), np.float32)
                client.call("l", x)  # connects
                eventually(lambda: cluster.mesh.router.fanout._check is None, 20, "nothing is in flight any more")
                recorder.on = True
                reply = client.call("l", x)
                recorder.on = False
        finally:
            cluster.close()
    np.testing.assert_allclose(reply.output, np.sin(x), rtol=1e-6)
    listed = spine()
    assert len(listed) == len(set(listed)) <= MOST
    assert not strangers(recorder.entered, listed)
    assert listed[-1] in recorder.entered  # it waits while the replica, in a thread of its own, begins
    assert [name for name in recorder.entered if name in listed[:-1]] == listed[:-1], "each of them, in this order"


def test_a_file_outside_the_list_is_noticed() -> None:
    with profiled() as recorder:
        recorder.on = True
        Reconciler().restore({})
    planted = ["cluster/control/reconciler.py", "cluster/control/swap.py", "cluster/control/retention.py"]
    assert strangers(recorder.entered, spine()) == planted


@pytest.mark.parametrize("pattern", [*ADAPTERS, *HELPERS])
def test_every_helper_that_is_declared_is_there(pattern: str) -> None:
    assert list(ROOT.glob(pattern))
