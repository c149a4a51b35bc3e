"""The socket for clients of the same user: gRPC finds it under any path, and no other user can replace it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from expertmesh.cluster.machine.unix_socket import LONGEST, grpc_address, own_address
from expertmesh.experts.errors import ConfigError


def reached(address: str) -> str:
    """What a server says that listens where gRPC would look."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address.removeprefix("unix:"))
        return client.recv(10).decode()


@pytest.mark.parametrize("folder", ["plain", "with space", "100%41", "müll", "x" * 100], ids=lambda name: name[:12])
def test_a_socket_is_reached_under_any_path(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "a.sock"
    path.parent.mkdir(mode=0o700)
    address = own_address(path)
    assert address == grpc_address(path)
    assert len(address.removeprefix("unix:").encode()) <= LONGEST
    assert address.isascii()
    assert not set(address) & set(" %?#")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address.removeprefix("unix:"))
        server.listen()
        assert path.is_socket()
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(server.accept()[0].sendall(b"here")))
        thread.start()
        assert reached(grpc_address(path)) == "here"
        thread.join(10)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_in_which_others_could_put_a_socket_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="others can write"):
        own_address(tmp_path / "a.sock")


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        own_address(tmp_path / "missing" / "a.sock")
