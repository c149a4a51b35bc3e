"""A router starts to listen once, on both of its ports or on none."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import run_async

from expertmesh.cluster.gateway.gateway import GatewaySettings
from expertmesh.cluster.machine.ports import free_port, listens
from expertmesh.cluster.runtime.listening import ListeningService
from expertmesh.cluster.runtime.router_process import ServiceSettings
from expertmesh.experts.errors import Unavailable
from expertmesh.router.fanout.transport import LocalTransport


def service(folder: Path, port: int = 0, metrics_port: int = 0) -> ListeningService:
    settings = ServiceSettings(
        name="x",
        gateway=GatewaySettings(port=port),
        metrics_port=metrics_port,
        tokens=(),
        max_rows_in_flight=8,
        state_dir=str(folder / "state"),
    )
    control: Any = None  # which is asked only by requests
    return ListeningService(settings, LocalTransport(), control)


def test_whoever_starts_it_at_the_same_time_gets_the_same_ports(tmp_path: Path) -> None:
    async def main() -> None:
        router = service(tmp_path)
        first, second = await asyncio.gather(router.start(), router.start())
        assert first == second == await router.start()
        assert all(listens(f"127.0.0.1:{port}") for port in first)
        await router.stop()
        assert not any(listens(f"127.0.0.1:{port}") for port in first)

    run_async(main())


@pytest.mark.parametrize("taken", ["port", "metrics_port"])
def test_a_router_that_lacks_a_port_listens_nowhere_until_it_has_it(tmp_path: Path, taken: str) -> None:
    async def main() -> None:
        ports = {"port": free_port("127.0.0.1"), "metrics_port": free_port("127.0.0.1")}
        router = service(tmp_path, **ports)
        (other,) = [port for name, port in ports.items() if name != taken]
        with socket.create_server(("127.0.0.1", ports[taken])):
            for _ in range(2):
                with pytest.raises(Unavailable, match="cannot listen"):
                    await router.start()
                assert not listens(f"127.0.0.1:{other}")
        assert await router.start() == (ports["port"], ports["metrics_port"])
        assert all(listens(f"127.0.0.1:{port}") for port in ports.values())
        await router.stop()

    run_async(main())
