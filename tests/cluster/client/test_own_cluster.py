"""Clients of the user who runs a cluster: their token goes to that cluster alone, however they name it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tls import CERTIFICATE, KEY

from expertmesh import AsyncClient, Client, Cluster, Expert, Layer, errors, gates
from expertmesh.cluster.machine.run_files import RunFile
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role

pytestmark = pytest.mark.usefixtures("own_home")
X = np.ones(3)
NAME = "own"


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    """The settings of a cluster with TLS."""
    for name, text in (("key", KEY), ("cert", CERTIFICATE)):
        (tmp_path / f"{name}.pem").write_bytes(text)
    return {"tls_key": tmp_path / "key.pem", "tls_cert": tmp_path / "cert.pem"}


def start(**settings: Any) -> Cluster:
    layer = Layer("l", gates.Fixed([1.0]), {"e": Expert("numpy:sin")})
    return Cluster.start([layer], name=NAME, transport="local", port=0, **settings)


@pytest.fixture
def thief() -> Iterator[Any]:
    """Another user's server, which keeps what it is sent."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # HTTP/2 settings: go on
                    connection.settimeout(2)
                    try:
                        while data := connection.recv(65536):
                            heard.append(data)
                            if b"Bearer" in data:
                                break
                    except OSError:
                        continue

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], heard
        server.shutdown(socket.SHUT_RDWR)


def connected_to(run: RunFile) -> list[Callable[[], Client]]:
    return [lambda: Client(timeout=5), lambda: Client(run.endpoint, timeout=5), lambda: Client(name=NAME, timeout=5)]


@pytest.mark.parametrize("way", range(3))
def test_a_token_that_was_found_never_goes_to_whoever_has_the_port(thief: Any, way: int) -> None:
    port, heard = thief
    with start():
        run = replace(RunFile.read(NAME), endpoint=f"127.0.0.1:{port}", endpoints=[f"127.0.0.1:{port}"])
        run.write()
        with connected_to(run)[way]() as client:
            np.testing.assert_allclose(client.forward("l", X), np.sin(X))
    assert heard == []


def test_a_token_that_is_given_goes_where_it_is_given(thief: Any) -> None:
    port, heard = thief
    with Client(f"127.0.0.1:{port}", token="mine", timeout=1) as client, pytest.raises(errors.ExpertMeshError):
        client.forward("l", X)
    assert b"Bearer mine" in b"".join(heard)


def test_under_tls_local_clients_need_no_certificate(pem: dict[str, Path]) -> None:
    with start(**pem) as cluster:
        for client in (Client(), Client(cluster.endpoint)):
            with client:
                np.testing.assert_allclose(client.forward("l", X), np.sin(X))
                assert client.health() == "SERVING"
                assert client.endpoint == cluster.endpoint

        async def main() -> None:
            async with AsyncClient(cluster.endpoint) as other:
                assert (await other.status())["name"] == NAME

        asyncio.run(main())
        with Client(cluster.endpoint, ca_cert=pem["tls_cert"]) as client:
            np.testing.assert_allclose(client.forward("l", X), np.sin(X))
        token = read_token(RunFile.read(NAME).token_path, Role.READER)
        with Client(cluster.endpoint, token=token) as client, pytest.raises(errors.Unavailable, match="speak TLS"):
            client.forward("l", X)


def test_a_folder_that_others_can_write_into_is_not_trusted(own_home: Path) -> None:
    with start() as cluster:
        (own_home / "run").chmod(0o777)
        with pytest.raises(errors.ConfigError, match="others can write"):
            Client(cluster.endpoint)


def test_a_cluster_without_a_socket_is_told() -> None:
    with start() as cluster:
        replace(RunFile.read(NAME), socket=None, sockets=[], version="0.0.9").write()
        with pytest.raises(errors.FailedPrecondition, match=r"started by expertmesh 0\.0\.9, without a socket"):
            Client(cluster.endpoint)


def test_every_router_of_ones_own_cluster_is_called_over_its_socket() -> None:
    with start() as cluster:
        run = RunFile.read(NAME)
        second, third = "127.0.0.1:1", "10.0.0.9:50051"  # only the socket of the second is there; the third is far
        replace(run, endpoints=[run.endpoint, second, third], sockets=[*run.sockets, *run.sockets, ""]).write()
        with Client() as client:
            assert client.endpoints == [cluster.endpoint, second]
            for _ in range(4):
                np.testing.assert_allclose(client.forward("l", X), np.sin(X))
            assert {target.address for target in client._channels.targets} == {cluster.endpoint, second}
        with Client([second, cluster.endpoint]) as client:
            np.testing.assert_allclose(client.forward("l", X), np.sin(X))
        with pytest.raises(errors.FailedPrecondition, match=r"10\.0\.0\.9:50051 is on another machine: pass ca_cert="):
            Client(third)
        with pytest.raises(errors.InvalidRequest, match="a client calls one cluster"):
            Client([cluster.endpoint, "127.0.0.1:2"])


def test_a_client_of_ones_own_cluster_calls_all_its_routers(pem: dict[str, Path]) -> None:
    with start(routers=2, **pem) as cluster:
        ways: list[dict[str, Any]] = [{}, {"endpoint": cluster.endpoints}]
        for way in [*ways, {"endpoint": cluster.endpoints, "ca_cert": pem["tls_cert"]}]:
            with Client(**way) as client:
                assert client.endpoints == list(cluster.endpoints)
                for _ in range(4):
                    np.testing.assert_allclose(client.forward("l", X), np.sin(X))
                assert len(client._channels.targets) == 2
        with Client() as client:
            with client.pin() as one, client.pin() as other:
                assert {lease.pin.partition("@")[2] for lease in (one, other)} == {*cluster.endpoints}
                for pin in (one, other, one.pin, other.pin):
                    assert client.call("l", X, pin=pin).epoch == one.epoch
                assert {lease["pin"] for lease in client.leases()} == {one.pin, other.pin}
            assert client.leases() == []
            client.drain()
            for endpoint in cluster.endpoints:
                with Client(endpoint) as of_one, pytest.raises(errors.RouterUnavailable, match="is draining"):
                    of_one.forward("l", X)


def test_the_socket_goes_with_the_cluster(own_home: Path) -> None:
    path = own_home / "run" / f"{NAME}.sock"
    with start():
        assert path.is_socket()
    assert not path.exists()


def test_clients_of_one_user_are_told_apart() -> None:
    """The router serves its callers by turns, and on the socket they have no address."""
    seen: set[str] = set()
    with start() as cluster:
        router = cluster._backend._services["router-0"].router  # type: ignore[union-attr]
        forward = router.forward

        async def counted(request: Any) -> Any:
            seen.add(request.client)
            return await forward(request)

        router.forward = counted
        with Client() as one, Client() as two:
            for client in (one, two, one):
                client.forward("l", X)
    assert len(seen) == 2
