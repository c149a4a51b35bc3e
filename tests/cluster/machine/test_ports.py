"""A port that is held: nobody else listens there, whether this user's server is up or not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from expertmesh.cluster.machine.ports import hold_port, is_free, is_loopback
from expertmesh.experts.errors import FailedPrecondition

NOBODY = 65534
LISTEN = """
import os, socket, sys
if sys.argv[3]:
    os.setgroups([])
    os.setuid(int(sys.argv[3]))
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(sys.argv[2]))
try:
    server.bind(("127.0.0.1", int(sys.argv[1])))
    server.listen()
    print("listens")
except OSError as error:
    print(error.strerror)
"""


def listen(port: int, share: bool, user: int | None = None) -> str:
    """What another process is told that listens on a port."""
    command = [sys.executable, "-c", LISTEN, str(port), str(int(share)), "" if user is None else str(user)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_held_port_is_for_processes_of_this_user_that_share_it() -> None:
    with hold_port("127.0.0.1", 0, "port") as holder:
        port = holder.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        assert listen(port, share=False) == "Address already in use"
        assert listen(port, share=True) == "listens"
        assert listen(port, share=True) == "listens"  # as one that was restarted
    assert is_free("127.0.0.1", port)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_another_user_cannot_take_a_port_whose_server_is_down(host: str) -> None:
    with hold_port(host, 0, "port") as holder:
        port = holder.getsockname()[1]
        assert listen(port, share=True, user=NOBODY) == "Address already in use"
    assert listen(port, share=True, user=NOBODY) == "listens"


def test_a_port_that_is_held_or_listened_on_cannot_be_held() -> None:
    with hold_port("127.0.0.1", 0, "port") as holder:
        port = holder.getsockname()[1]
        with pytest.raises(FailedPrecondition, match=f"metrics_port 127.0.0.1:{port} cannot be used"):
            hold_port("127.0.0.1", port, "metrics_port")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(FailedPrecondition, match="choose another port"),
    ):
        hold_port("127.0.0.1", server.getsockname()[1], "port")


def test_a_port_can_be_held_again_while_closed_connections_linger() -> None:
    with hold_port("127.0.0.1", 0, "port") as holder, socket.socket() as server:
        port = holder.getsockname()[1]
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # as the gateway listens
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # who closes first keeps the connection for a minute, in TIME_WAIT
    hold_port("127.0.0.1", port, "port").close()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
