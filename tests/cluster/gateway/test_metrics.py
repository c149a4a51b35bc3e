"""The metrics page: for those with a token, in a form that Prometheus reads, with every figure of every expert."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Thread
from typing import Any

import pytest
import torch
from helpers.router_in_process import RouterInProcess
from helpers.tls import CERTIFICATE, KEY
from helpers.waiting import eventually, run_async
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cluster.gateway import metrics
from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.gateway.metrics import MOST_CONNECTIONS, MetricsServer, RouterCollector
from expertmesh.cluster.machine.ports import hold_port
from expertmesh.cluster.machine.tokens import new_token, token_digest
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import DeadlineExceeded, ExpertFailed, NotFound
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.fanout.telemetry import LATENCY_BUCKETS, Scaled
from expertmesh.router.fanout.transport import LocalTransport
from expertmesh.router.mixture.layer import Layer
from expertmesh.router.request.forward import Router

READER, OPERATOR, EXPIRED = new_token(), new_token(), new_token()
X = torch.ones(3, 2)
Get = dict[str, Any]


def served() -> Layer:
    """Two good experts, of which a row takes both, and a bad one that only a request's own routing reaches."""
    experts = {"a": Expert("torch:sin"), "b": Expert("torch:cos"), "bad": Expert("helpers.samples:raises")}
    return Layer("l", gates.Fixed([0.5, 0.25, 0.125], k=2), experts)


@pytest.fixture
def page() -> Iterator[Any]:
    """Serves the page of a router that has answered some requests; `get(token, path)` reads it."""
    servers: list[MetricsServer] = []

    async def main() -> None:
        async with RouterInProcess(served()) as mesh:
            for _ in range(2):
                await mesh.ask(X)
            with pytest.raises(ExpertFailed):
                await mesh.ask(X, indices=torch.full((3, 1), 2), weights=torch.ones(3, 1))
            with pytest.raises(NotFound):
                await mesh.ask(X, layer='made "up"\n')
            tokens = TokenTable()
            tokens.add(token_digest(READER), Role.READER)
            tokens.add(token_digest(OPERATOR), Role.OPERATOR)
            tokens.add(token_digest(EXPIRED), Role.READER, expires=1.0)
            servers.append(MetricsServer(mesh.router, tokens, "127.0.0.1", 0))

    run_async(main())

    def get(authorization: str | None, path: str = "/metrics") -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", servers[0].port, timeout=20)
        connection.request("GET", path, headers={} if authorization is None else {"Authorization": authorization})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    yield get
    servers[0].stop()


@contextmanager
def bare(**settings: Any) -> Iterator[MetricsServer]:
    """A page about a router that has answered nothing."""
    tokens = TokenTable()
    tokens.add(token_digest(READER), Role.READER)
    server = MetricsServer(Router(LocalTransport()), tokens, settings.pop("host", "127.0.0.1"), 0, **settings)
    try:
        yield server
    finally:
        server.stop()


def asked(connection: HTTPConnection) -> int:
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {READER}"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def test_half_sent_requests_do_not_keep_others_from_the_page() -> None:
    with bare() as server, ExitStack() as slow:
        for _ in range(3 * MOST_CONNECTIONS):
            connection = slow.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x")
            assert asked(HTTPConnection("127.0.0.1", server.port, timeout=20)) == 200
        threads = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
        eventually(lambda: sum(map(Thread.is_alive, threads)) <= MOST_CONNECTIONS, 20, "the oldest are ended")


def test_a_connection_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CONNECTION_SECONDS", 0.2)
    with bare() as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")

        def is_ended() -> bool:
            try:
                connection.sendall(b"X: y\r\n")  # never a pause that a time-out would notice
            except OSError:
                return True
            return False

        eventually(is_ended, 20, "it is ended")


def test_beyond_loopback_the_page_is_under_tls() -> None:
    with bare(host="0.0.0.0", tls=(KEY, CERTIFICATE)) as server, ExitStack() as slow:
        for _ in range(3):
            slow.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))  # no handshake
        trusting = ssl.create_default_context(cadata=CERTIFICATE.decode())
        assert asked(HTTPSConnection("127.0.0.1", server.port, timeout=20, context=trusting)) == 200
        with pytest.raises((OSError, HTTPException)):
            asked(HTTPConnection("127.0.0.1", server.port, timeout=20))
    with bare(tls=(KEY, CERTIFICATE)) as server:
        assert asked(HTTPConnection("127.0.0.1", server.port, timeout=20)) == 200


def test_the_page_listens_on_a_port_that_its_owner_holds() -> None:
    with hold_port("127.0.0.1", 0, "metrics_port") as holder:
        port = holder.getsockname()[1]
        router, tokens = Router(LocalTransport()), TokenTable()
        with pytest.raises(OSError, match="in use"):
            MetricsServer(router, tokens, "127.0.0.1", port)
        MetricsServer(router, tokens, "127.0.0.1", port, port_held=True).stop()


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def figures(family: Metric, label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in family.samples if not sample.name.endswith("_created")}


@pytest.mark.parametrize("token", [READER, OPERATOR], ids=["reader", "operator"])
def test_the_page_has_every_figure_of_every_expert(page: Any, token: str) -> None:
    status, text = page(f"Bearer {token}")
    assert status == 200
    found = families(text)
    assert figures(found["expertmesh_expert_rows"], "expert") == {"l/a": 6.0, "l/b": 6.0}
    assert figures(found["expertmesh_expert_errors"], "expert") == {"l/bad": 1.0}
    assert figures(found["expertmesh_expert_gate_mass"], "expert") == {"l/a": 3.0, "l/b": 1.5, "l/bad": 3.0}
    replicas = {"l/a#0", "l/b#0", "l/bad#0"}
    assert figures(found["expertmesh_replica_queued_rows"], "replica") == dict.fromkeys(replicas, 0.0)
    assert figures(found["expertmesh_replica_rows_in_flight"], "replica") == dict.fromkeys(replicas, 0.0)
    assert figures(found["expertmesh_replica_messages"], "replica") == {"l/a#0": 2.0, "l/b#0": 2.0, "l/bad#0": 1.0}
    assert figures(found["expertmesh_layer_batches"], "layer") == {"l": 3.0}
    assert [sample.value for sample in found["expertmesh_epoch"].samples] == [1.0]
    requests = {
        (sample.labels["layer"], sample.labels["code"]): sample.value
        for sample in found["expertmesh_requests"].samples
        if sample.name == "expertmesh_requests_total"
    }
    assert requests == {("l", "OK"): 2.0, ("l", "INTERNAL"): 1.0, ("", "NOT_FOUND"): 1.0}


def test_histograms_are_whole(page: Any) -> None:
    found = families(page(f"Bearer {READER}")[1])
    for name, key, count in [("expert_seconds", {"expert": "l/a"}, 2), ("request_seconds", {"layer": "l"}, 3)]:
        samples = [s for s in found[f"expertmesh_{name}"].samples if key.items() <= s.labels.items()]
        buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
        assert [bound for bound, _ in buckets] == [*LATENCY_BUCKETS, float("inf")]
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        assert buckets[-1][1] == count
        assert [s.value for s in samples if s.name.endswith("_count")] == [count]
        assert next(s.value for s in samples if s.name.endswith("_sum")) > 0


REFUSED: dict[str, str | None] = {
    "none": None,
    "empty": "",
    "no token": "Bearer",
    "an empty token": "Bearer ",
    "another scheme": f"Basic {READER}",
    "no scheme": READER,
    "expired": f"Bearer {EXPIRED}",
    "longer": f"Bearer {READER}x",
    "not ASCII": "Bearer é",
}


@pytest.mark.parametrize("authorization", REFUSED.values(), ids=REFUSED)
def test_without_a_token_that_is_known_there_is_no_page(page: Any, authorization: str | None) -> None:
    status, text = page(authorization)
    assert status == 401
    assert "expertmesh_" not in text
    assert str(READER) not in text


def test_there_is_one_page(page: Any) -> None:
    assert page(f"bearer {READER}", "/other")[0] == 404
    assert page(None, "/other")[0] == 401
    assert page(f"Bearer {READER}", "/metrics?name[]=expertmesh_epoch")[0] == 200


def test_rows_that_wait_are_told() -> None:
    release = threading.Event()

    def slow(rows: torch.Tensor) -> torch.Tensor:
        assert release.wait(60)
        return rows

    async def main() -> None:
        async with RouterInProcess(Layer("l", gates.Fixed([1.0]), {"e": Expert.from_function(slow)})) as mesh:
            asked = []
            for _ in range(4):
                asked.append(asyncio.ensure_future(mesh.ask(X, timeout=60)))
                while mesh.router.view.rows_in_flight()["l/e#0"] < 3 * len(asked):
                    await asyncio.sleep(0)
                for _ in range(5):
                    await asyncio.sleep(0)
            mesh.router.telemetry.scaled = {"l/e": Scaled(wanted=3, up=2, down=1)}
            found = {family.name: family for family in RouterCollector(mesh.router, "router-0").collect()}
            assert figures(found["expertmesh_replica_rows_in_flight"], "replica") == {"l/e#0": 12.0}
            assert 0 < figures(found["expertmesh_replica_queued_rows"], "replica")["l/e#0"] <= 6.0
            assert figures(found["expertmesh_layer_rows_in_flight"], "layer") == {"l": 12.0}
            assert figures(found["expertmesh_autoscale_replicas"], "expert") == {"l/e": 3.0}
            decided = {s.labels["direction"]: s.value for s in found["expertmesh_autoscale_decisions"].samples}
            assert decided == {"up": 2.0, "down": 1.0}
            release.set()
            await asyncio.gather(*asked)

    try:
        run_async(main())
    finally:
        release.set()


@pytest.fixture
def quick_turns() -> Iterator[None]:
    """Threads of Python take turns fifty times as often as they do by default."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 50)
    yield
    sys.setswitchinterval(usual)


def test_the_page_can_be_read_at_any_moment(quick_turns: None) -> None:
    """The page is made in another thread than that in which the router changes its figures."""

    async def main() -> None:
        async with RouterInProcess(served()) as mesh:
            stop, wrong = threading.Event(), list[BaseException]()

            def read() -> None:
                try:
                    while not stop.is_set():
                        assert len(list(RouterCollector(mesh.router, "router-0").collect())) > 10
                except BaseException as error:  # noqa: BLE001 (told to the test's own thread)
                    wrong.append(error)

            thread = threading.Thread(target=read)
            thread.start()
            for number in range(30):
                asked = [mesh.ask(X, timeout=0.0 if n % 3 == 0 else 30.0) for n in range(8)]
                for error in await asyncio.gather(*asked, return_exceptions=True):
                    assert not isinstance(error, BaseException) or isinstance(error, DeadlineExceeded)
                mesh.report(mesh.replica("l/a#0", incarnation=str(number)))
            stop.set()
            thread.join(60)
            assert not wrong

    run_async(main())
