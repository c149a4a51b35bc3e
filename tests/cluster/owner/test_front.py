"""Where routers listen: the ports that the owner holds for them, their settings, and the run file."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from expertmesh import Expert, FailedPrecondition, Layer, gates
from expertmesh.cluster.config.cluster_config import ClusterConfig
from expertmesh.cluster.machine.ports import free_port
from expertmesh.cluster.machine.run_files import RunFile, home, socket_path
from expertmesh.cluster.owner.front import FrontPorts, followed, router_settings, run_file
from expertmesh.cluster.runtime.places import Place, away_from_owner, place_of

pytestmark = pytest.mark.usefixtures("own_home")


def config(**settings: Any) -> ClusterConfig:
    layer = Layer("news", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})
    return ClusterConfig(layers=(layer,), name="front", **{"port": 0, **settings})


def free_ports(count: int) -> int:
    """The first of as many ports in a row that are free."""
    while True:
        first = free_port("127.0.0.1")
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


def test_each_router_has_the_next_port_and_all_are_held() -> None:
    first, metrics = free_ports(3), free_ports(3)
    ports = FrontPorts(config(routers=3, port=first, metrics_port=metrics))
    try:
        assert ports.ports == [first, first + 1, first + 2]
        assert ports.metrics_ports == [metrics, metrics + 1, metrics + 2]
        with pytest.raises(FailedPrecondition, match=f"port 127.0.0.1:{first + 2} cannot be used"):
            FrontPorts(config(port=first + 2))
    finally:
        ports.close()
    FrontPorts(config(port=first + 2)).close()


def test_a_port_in_use_says_whose_it_would_be_and_no_other_stays_held() -> None:
    first = free_ports(3)
    told = f"port of router-1 127.0.0.1:{first + 1} cannot be used"
    with socket.create_server(("127.0.0.1", first + 1)), pytest.raises(FailedPrecondition, match=told):
        FrontPorts(config(routers=3, port=first))
    socket.create_server(("127.0.0.1", first)).close()


@pytest.mark.parametrize("address", [None, "auto"])
def test_free_ports_are_all_different(address: str | None) -> None:
    ports = FrontPorts(config(routers=8, address=address))
    try:
        assert len({*ports.ports, *ports.metrics_ports}) == 16
        assert ports.held == (address is None)
    finally:
        ports.close()


def test_routers_differ_in_name_ports_and_socket_alone(tmp_path: Path) -> None:
    home()
    wanted = config(routers=2)
    ports = FrontPorts(wanted)
    try:
        one, two = router_settings(wanted, ports, tmp_path).values()
    finally:
        ports.close()
    assert (one.router, two.router) == ("router-0", "router-1")
    assert (one.gateway.port, two.gateway.port) == tuple(ports.ports)
    assert (one.metrics_port, two.metrics_port) == tuple(ports.metrics_ports)
    assert [one.gateway.socket, two.gateway.socket] == [str(socket_path("front", n)) for n in (0, 1)]
    assert one.tokens == two.tokens
    places = [place_of(own, own.gateway.port, own.metrics_port) for own in (one, two)]
    run_file(wanted, places, None, {}).write()
    run = RunFile.read("front")
    assert run.endpoints == [f"127.0.0.1:{port}" for port in ports.ports]
    assert run.metrics_endpoints == [f"http://127.0.0.1:{port}/metrics" for port in ports.metrics_ports]
    assert run.sockets == [own.gateway.socket for own in (one, two)]
    assert (run.endpoint, run.socket, run.metrics_endpoint) == (
        run.endpoints[0], run.sockets[0], run.metrics_endpoints[0],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("host", "endpoint"),
    [("0.0.0.0", "10.1.2.3:7"), ("10.1.2.2", "10.1.2.3:7"), ("mesh.example.org", "10.1.2.3:7")],
)
def test_a_router_on_another_node_listens_at_the_address_of_that_node(host: str, endpoint: str, tmp_path: Path) -> None:
    home()
    for file in ("cert", "key"):
        (tmp_path / file).write_text("PEM")
    wanted = config(routers=2, address="auto", host=host, tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")
    ports = FrontPorts(config(routers=2, address="auto"))
    settings = router_settings(wanted, ports, tmp_path)["router-1"]
    away = away_from_owner(settings, "10.1.2.3")
    assert (away.gateway.port_held, away.state_dir) == (False, None)
    here = place_of(away, 7, 8, "10.1.2.3")
    assert here == Place(endpoint=endpoint, metrics_endpoint="http://127.0.0.1:8/metrics", socket="")


def test_the_run_file_follows_a_router_to_another_node_and_back() -> None:
    places = [
        Place(endpoint=f"10.0.0.1:{n}", metrics_endpoint=f"https://10.0.0.1:{n}/metrics", socket=f"{n}") for n in (7, 8)
    ]
    run = run_file(config(routers=2), places, None, {})
    here = {"endpoint": "10.0.0.1:7", "metrics_endpoint": "https://10.0.0.1:7/metrics", "node": "10.0.0.1/a"}
    away = {"endpoint": "10.0.0.2:8", "metrics_endpoint": "https://10.0.0.2:8/metrics", "node": "10.0.0.2/b"}
    back = {"endpoint": "10.0.0.1:8", "metrics_endpoint": "https://10.0.0.1:8/metrics", "node": "10.0.0.1/a"}
    assert followed(run, {}) == followed(run, {"router-0": {"state": "starting"}}) == run
    moved = followed(run, {"router-0": here, "router-1": away})
    assert (moved.endpoints, moved.sockets) == (["10.0.0.1:7", "10.0.0.2:8"], [str(socket_path("front")), ""])
    assert moved.metrics_endpoints[1] == "https://10.0.0.2:8/metrics"
    returned = followed(moved, {"router-0": here, "router-1": back})
    assert returned.endpoints == run.endpoints
    assert returned.sockets == [str(socket_path("front", number)) for number in (0, 1)]
