"""Addresses and ports of this machine: their notation, whether a server can listen there, and free ports."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import suppress

from ...experts.errors import FailedPrecondition

PORT_TRIES = 50
LISTENS_SECONDS = 0.5


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for an address with colons, with or without brackets; IPv4 for other addresses and for names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """An address as clients write it: "127.0.0.1:80", "[::1]:80"."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address, with or without brackets, is reachable only from this machine."""
    return ipaddress.ip_address(host.strip("[]")).is_loopback if is_address(host) else host == "localhost"


def is_address(host: str) -> bool:
    """Whether a host is an address, with or without brackets, and not a name."""
    try:
        return ipaddress.ip_address(host.strip("[]")) is not None
    except ValueError:
        return False


def check_port(host: str, port: int, what: str) -> None:
    """Check that a server can listen on an address; port 0 is always free. Raises FailedPrecondition."""
    if port == 0:
        return
    try:
        _bound(host, port, reuse=True)
    except OSError as error:
        raise _in_use(host, port, what, error) from None


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with suppress(OSError):
        return _bound(host, port, reuse=True) >= 0
    return False


def listens(endpoint: str) -> bool:
    """Whether something accepts a connection at "host:port", within half a second."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_SECONDS).close()
    except OSError:
        return False
    return True


def hold_port(host: str, port: int, what: str) -> socket.socket:
    """Bind a port without listening: while the socket is open, no other user of this machine can listen there.

    Processes of this user listen on it with SO_REUSEPORT, also one that was restarted. Port 0 takes a free one.
    Raises FailedPrecondition.
    """
    port = port or free_port(host)
    check_port(host, port, what)
    everywhere = host.strip("[]") in ("0.0.0.0", "::") and socket.has_dualstack_ipv6()
    holder = socket.socket(socket.AF_INET6 if everywhere else family_of(host), socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if everywhere:  # as gRPC listens
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind(("::" if everywhere else host.strip("[]"), port))
    except OSError as error:
        holder.close()
        raise _in_use(host, port, what, error) from None
    return holder


def free_port(host: str) -> int:
    """A port that is free now, if possible outside the ranges that the system and Ray assign by themselves.

    The port is bound only after many processes have started. By then, an ephemeral port could be taken by a connection.
    Ray's workers use 10002 to 19999; the ephemeral range starts at 32768.
    """
    draw = random.SystemRandom()
    for _ in range(PORT_TRIES):
        with suppress(OSError):
            return _bound(host, draw.randrange(20_000, 32_768))
    return _bound(host, 0)


def _in_use(host: str, port: int, what: str, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"{what} {host}:{port} cannot be used: {error.strerror}. Another cluster may listen there: choose another "
        "port, or 0 for any free one"
    )


def _bound(host: str, port: int, *, reuse: bool = False) -> int:
    """Bind a socket to an address, close it, and return its port. Raises OSError."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        probe.bind((host.strip("[]"), port))
        return int(probe.getsockname()[1])
