"""Finds the routers and the token of a client: from arguments, the environment, or this user's run files.

A token that is found in a token file goes only to the cluster that wrote the file: over its Unix sockets, which no
other user can replace, or over TLS. A token that is given goes to the addresses that are given.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....experts.errors import FailedPrecondition, InvalidRequest, NotFound, Unauthenticated
from ...machine.ports import is_address, is_loopback, with_port
from ...machine.run_files import RunFile, find, find_endpoint
from ...machine.tokens import read_tokens
from ...machine.unix_socket import own_address
from ...rpc.methods import Role
from .balance import Target

TOKEN_VARIABLE = "EXPERTMESH_TOKEN"
LOOK_UP_SECONDS = 5.0
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The routers of a cluster, as they were given or found, and the credentials for them.

    `token` is the one that was given, or the highest of the token file, whose `tokens` are then known by role.
    `ca_cert` is the PEM text that TLS trusts; None means no TLS.
    """

    given: tuple[Target, ...]
    token: str = field(repr=False)
    tokens: Mapping[Role, str] = field(default_factory=dict, repr=False)
    ca_cert: bytes | None = field(default=None, repr=False)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses, each "host:port"."""
        return tuple(target.address for target in self.given)

    @property
    def has_names(self) -> bool:
        """Whether an address has a name that may stand for several routers."""
        return any(_is_name(target) for target in self.given)

    def look_up(self) -> list[Target]:
        """All routers: a name that resolves to several addresses is several. Waits for the resolver, at most 5 s."""
        return [target for given in self.given for target in (_expanded(given) if _is_name(given) else [given])]


def resolve(
    endpoint: str | Sequence[str] | None,
    *,
    token: str | None,
    name: str | None,
    ca_cert: str | os.PathLike[str] | None,
    token_option: str = "token=",
) -> Endpoint:
    """Find missing arguments: the endpoints in the run file of the cluster `name`, the tokens in its token file.

    `token_option` is the option that the error for a missing token suggests.

    Raises NotFound if there is no such cluster, Unauthenticated if there is no token, FailedPrecondition for a cluster
    without a socket, and InvalidRequest for a malformed address, for one beyond loopback without TLS, or for addresses
    of several clusters.
    """
    run = find(name) if endpoint is None else None
    addresses = _reachable(run, ca_cert is not None) if run is not None else _listed(endpoint)
    loopback = [_is_loopback(address) for address in addresses]
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE) or None
    if run is None and token is None:
        run = _cluster_at(addresses)
    local = run is not None and ca_cert is None
    for address, is_near in zip(addresses, loopback, strict=True):
        if not local and not is_near and ca_cert is None:
            raise InvalidRequest(f"{address} is not loopback, so the token would travel in the clear: pass ca_cert=")
    tokens = {} if token is not None else _tokens(addresses[0], run, token_option)
    targets = [
        Target(
            address=address,
            connect_to=_socket(run, address) if run is not None and local else address,
            loopback=is_near or local,
        )
        for address, is_near in zip(addresses, loopback, strict=True)
    ]
    return Endpoint(
        given=tuple(targets),
        token=tokens[max(tokens)] if token is None else token,
        tokens=tokens,
        ca_cert=_read(ca_cert),
    )


def _listed(endpoint: str | Sequence[str] | None) -> list[str]:
    """The addresses of an argument, each once. Raises InvalidRequest if there is none."""
    listed: list[Any] = [endpoint] if isinstance(endpoint, str) or endpoint is None else list(dict.fromkeys(endpoint))
    if not listed:
        raise InvalidRequest("endpoint is an empty list: give at least one host:port, or None for your own cluster")
    return listed


def _is_loopback(endpoint: object) -> bool:
    match = _ADDRESS.fullmatch(endpoint) if isinstance(endpoint, str) else None
    if match is None or not 0 < int(match[2]) < 65536:
        raise InvalidRequest(f"endpoint {endpoint!r} must have the form host:port, such as 127.0.0.1:50051")
    return is_loopback(match[1])


def _is_name(target: Target) -> bool:
    return not target.loopback and not is_address(target.address.rpartition(":")[0])


def _expanded(target: Target) -> list[Target]:
    """The routers behind a name: itself, unless it resolves to several addresses."""
    host, _, port = target.address.rpartition(":")
    found: list[str] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError:
            return  # gRPC tries for itself, and says what is wrong
        family = answers[0][0]  # the other one leads to the same machines
        hosts = dict.fromkeys(str(answer[4][0]) for answer in answers if answer[0] == family)
        found.extend(with_port(host, int(port)) for host in hosts)

    thread = threading.Thread(target=look_up, daemon=True)  # the resolver has no timeout
    thread.start()
    thread.join(LOOK_UP_SECONDS)
    addresses = tuple(found)
    if len(addresses) < 2:
        return [target]
    return [Target(address=item, connect_to=item, loopback=False, authority=host) for item in addresses]


def _cluster_at(addresses: Sequence[str]) -> RunFile | None:
    """This user's cluster that listens at all of these addresses; None if it has none at the first."""
    runs = [find_endpoint(address) for address in addresses]
    for address, run in zip(addresses, runs, strict=True):
        if runs[0] is not None and (run is None or run.name != runs[0].name):
            raise InvalidRequest(
                f"{address} is no router of your cluster {runs[0].name!r}, which is at {addresses[0]}: a client calls "
                "one cluster"
            )
    return runs[0]


def _reachable(run: RunFile, with_tls: bool) -> list[str]:
    """The routers of this user's cluster: all over TLS, or those on this machine over their sockets."""
    here = [address for address in run.endpoints if run.socket_of(address)]
    return run.endpoints if with_tls or not here else here


def _socket(run: RunFile, address: str) -> str:
    path = run.socket_of(address)
    if path is not None:
        return own_address(path)
    if any(run.sockets):
        raise FailedPrecondition(f"the router at {address} is on another machine: pass ca_cert=, or token= as well")
    raise FailedPrecondition(
        f"cluster {run.name!r} was started by expertmesh {run.version}, without a socket for clients of its user: "
        "restart it, or pass token="
    )


def _tokens(address: str, run: RunFile | None, option: str) -> Mapping[Role, str]:
    if run is None:
        raise Unauthenticated(
            f"no token for {address}: you have no running cluster there. Pass {option}, or set {TOKEN_VARIABLE}"
        )
    tokens = read_tokens(run.token_path)
    if not tokens:
        raise NotFound(f"{run.token_path} holds no token: restart the cluster")
    return tokens


def _read(ca_cert: str | os.PathLike[str] | None) -> bytes | None:
    if ca_cert is None:
        return None
    try:
        return Path(ca_cert).read_bytes()
    except OSError as error:
        raise NotFound(f"ca_cert {os.fspath(ca_cert)} cannot be read: {error.strerror}") from None
