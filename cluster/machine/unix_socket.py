"""The Unix socket over which clients of the same user reach a cluster: what gRPC calls it, and who could replace it."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from .durable_files import check_private

LONGEST = 107
"""The bytes of a path that the system takes as the name of a socket."""

_PLAIN = re.compile(r"[A-Za-z0-9/._+~-]*")  # gRPC reads the path as part of a URI


def grpc_address(path: str | os.PathLike[str]) -> str:
    """The address of a socket for a gRPC server or channel.

    A path that is too long, or not plain, is named by a descriptor of its folder, which stays open.
    """
    socket = Path(path)
    if len(os.fsencode(socket)) <= LONGEST and _PLAIN.fullmatch(str(socket)):
        return f"unix:{socket}"
    return f"unix:/proc/self/fd/{_opened(socket.parent)}/{socket.name}"


def own_address(path: str | os.PathLike[str]) -> str:
    """`grpc_address` for a client, which proves the server: no other user can put a socket into the folder.

    Raises ConfigError if one could.
    """
    check_private(Path(path).parent, "EXPERTMESH_HOME")
    return grpc_address(path)


@cache
def _opened(folder: Path) -> int:
    return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
