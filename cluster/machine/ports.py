"""Ports of this machine: whether one can be listened on, and one that is free."""

from __future__ import annotations

import random
import socket

from ...experts.errors import FailedPrecondition

PORT_TRIES = 50


def check_port(host: str, port: int, what: str) -> None:
    """Check that an address can be listened on. Raises FailedPrecondition; port 0 is always free."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise FailedPrecondition(
                f"{what} {host}:{port} cannot be used: {error.strerror}. Another cluster may listen there "
                "(`expertmesh status`); choose another with --port, or 0 for any free one"
            ) from None


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment, and that the system gives to nobody by itself if there is one.

    It is used only once many processes have started: a port that any connection may be given could be gone by then.
    Ray's workers take 10002 to 19999, systems begin to give away at 32768.
    """
    draw = random.SystemRandom()
    for port in [*(draw.randrange(20_000, 32_768) for _ in range(PORT_TRIES)), 0]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host.strip("[]"), port))
            except OSError:
                if port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 is free or raises")
