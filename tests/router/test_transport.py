"""The in-process transport: one thread a host, typed errors, nothing left running."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace

import pytest
import torch
from helpers.router_in_process import load
from helpers.waiting import run_async, until
from torch import Tensor

from expertmesh.experts.errors import ExpertMeshError, Unavailable
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import ExpertCall, ExpertReply, Part
from expertmesh.experts.spec import Expert
from expertmesh.router.fanout import transport as module
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.transport import LocalTransport, report_of

ROWS = torch.ones(2, 3)


def host_of(expert: Expert) -> tuple[ExpertHost, ExpertCall]:
    host = ExpertHost()
    version = load(host, "l/e", expert, 1).version
    return host, ExpertCall(1, (Part("l/e", version, 0, 2),), ROWS, torch.tensor([0, 1]))


def transport_to(**hosts: ExpertHost) -> LocalTransport:
    transport = LocalTransport()
    for name, host in hosts.items():
        transport.add(name, host)
    return transport


async def sent(transport: LocalTransport, name: str, call: ExpertCall) -> ExpertReply:
    answer: asyncio.Future[ExpertReply | ExpertMeshError] = asyncio.get_running_loop().create_future()
    transport.send(Replica(name), call, answer.set_result)
    reply = await answer
    if isinstance(reply, ExpertMeshError):
        raise reply
    return reply


def answer_of(reply: ExpertReply) -> Tensor:
    (answer,) = reply.outputs
    assert isinstance(answer, Tensor)
    return answer


def test_a_message_is_computed_by_its_host() -> None:
    host, call = host_of(Expert("torch:exp"))
    transport = transport_to(a=host)
    reply = asyncio.run(sent(transport, "a", call))
    assert reply.incarnation == host.incarnation
    assert torch.equal(answer_of(reply), ROWS.exp())
    transport.close()


def test_an_expert_that_does_not_return_is_named_and_its_replica_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    returns = threading.Event()
    monkeypatch.setattr(module, "HUNG_SECONDS", 0.0)

    def hangs(rows: Tensor) -> Tensor:
        returns.wait(60)
        return rows

    async def main() -> None:
        host, call = host_of(Expert.from_function(hangs))
        transport = transport_to(a=host)
        for timeout, state in ((math.inf, READY), (60.0, READY), (-1.0, "hung")):
            returns.clear()
            answer = asyncio.ensure_future(sent(transport, "a", replace(call, timeout=timeout)))
            await until(lambda: host._computing)
            report = report_of("a", host, "restart it", node="here")
            assert (report.state, report.node, report.incarnation) == (state, "here", host.incarnation)
            assert report.problem.startswith("l/e has not returned for ") == (state == "hung")
            assert report.problem.endswith(": restart it") == (state == "hung")
            returns.set()
            await answer
            assert report_of("a", host, "restart it").state == READY
        transport.close()

    run_async(main())


def test_a_replica_that_is_gone_or_closed_is_unavailable() -> None:
    host, call = host_of(Expert("torch:exp"))
    transport = transport_to(a=host)
    for name in ("b", "a"):
        if name == "a":
            transport.remove("a")
        with pytest.raises(Unavailable, match="the replica is gone; retry"):
            asyncio.run(sent(transport, name, call))
    transport.remove("a")
    transport.close()


def test_a_thread_that_is_shut_down_under_a_message_is_unavailable() -> None:
    host, call = host_of(Expert("torch:exp"))
    transport = transport_to(a=host)
    transport._threads["a"].shutdown()  # as `remove` in another thread does, between the look-up and the call
    with pytest.raises(Unavailable, match="the replica is gone; retry"):
        asyncio.run(sent(transport, "a", call))


def test_hosts_do_not_wait_for_each_other_and_one_computes_one_message_at_a_time() -> None:
    meet, inside = threading.Barrier(2, timeout=20), []

    def both(rows: Tensor) -> Tensor:
        inside.append(1)
        assert len(inside) <= 2
        meet.wait()
        inside.pop()
        return rows

    host, call = host_of(Expert.from_function(both))
    other, _ = host_of(Expert.from_function(both))
    transport = transport_to(a=host, b=other)

    async def main() -> None:
        calls = [sent(transport, name, call) for name in ("a", "b", "a", "b")]
        for reply in await asyncio.gather(*calls):
            assert torch.equal(answer_of(reply), ROWS)

    asyncio.run(main())
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("expert-")]
    assert len(threads) == 2
    transport.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
