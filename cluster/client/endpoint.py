"""Finds the endpoint and token of a client: from arguments, the environment, or this user's run files.

A token that is found in a token file goes only to the cluster that wrote the file: over its Unix socket, which no other
user can replace, or over TLS. A token that is given goes to the address that is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...experts.errors import FailedPrecondition, InvalidRequest, NotFound, Unauthenticated
from ..machine.ports import is_loopback
from ..machine.run_files import RunFile, find, find_endpoint
from ..machine.tokens import read_tokens
from ..machine.unix_socket import own_address
from ..rpc.methods import Role

TOKEN_VARIABLE = "EXPERTMESH_TOKEN"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server's address and credentials.

    `target` is what gRPC connects to: `address`, or the socket of this user's own cluster. `token` is the one that was
    given, or the highest of the token file, whose `tokens` are then known by role. `ca_cert` is the PEM text that TLS
    trusts; None means no TLS.
    """

    address: str
    target: str
    token: str = field(repr=False)
    tokens: Mapping[Role, str] = field(default_factory=dict, repr=False)
    loopback: bool
    ca_cert: bytes | None = field(default=None, repr=False)


def resolve(
    endpoint: str | None,
    *,
    token: str | None,
    name: str | None,
    ca_cert: str | os.PathLike[str] | None,
    token_option: str = "token=",
) -> Endpoint:
    """Find missing arguments: the endpoint in the run file of the cluster `name`, the tokens in its token file.

    `token_option` is the option that the error for a missing token suggests.

    Raises NotFound if there is no such cluster, Unauthenticated if there is no token, FailedPrecondition for a cluster
    without a socket, and InvalidRequest for a malformed address, or one beyond loopback without TLS.
    """
    run = find(name) if endpoint is None else None
    address = endpoint if run is None or endpoint is not None else run.endpoint
    loopback = _is_loopback(address)
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE) or None
    if run is None and token is None:
        run = find_endpoint(str(address))
    local = run is not None and ca_cert is None
    if not local and not loopback and ca_cert is None:
        raise InvalidRequest(f"{address} is not loopback, so the token would travel in the clear: pass ca_cert=")
    tokens = {} if token is not None else _tokens(str(address), run, token_option)
    return Endpoint(
        address=str(address),
        target=_socket(run) if run is not None and local else str(address),
        token=tokens[max(tokens)] if token is None else token,
        tokens=tokens,
        loopback=loopback or local,
        ca_cert=_read(ca_cert),
    )


def _is_loopback(endpoint: str | None) -> bool:
    match = _ADDRESS.fullmatch(endpoint or "")
    if match is None or not 0 < int(match[2]) < 65536:
        raise InvalidRequest(f"endpoint {endpoint!r} must have the form host:port, such as 127.0.0.1:50051")
    return is_loopback(match[1])


def _socket(run: RunFile) -> str:
    if run.socket is None:
        raise FailedPrecondition(
            f"cluster {run.name!r} was started by expertmesh {run.version}, without a socket for clients of its user: "
            "restart it, or pass token="
        )
    return own_address(run.socket)


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
