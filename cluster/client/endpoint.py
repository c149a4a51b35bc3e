"""Finds the endpoint and token of a client: from arguments, the environment, or this user's run files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ...experts.errors import InvalidRequest, NotFound, Unauthenticated
from ..machine.ports import is_loopback
from ..machine.run_files import find, token_for_endpoint
from ..machine.tokens import read_token

TOKEN_VARIABLE = "EXPERTMESH_TOKEN"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server's address and credentials. `ca_cert` is the PEM text that TLS trusts; None means no TLS."""

    address: str
    token: str = field(repr=False)
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
    """Find missing arguments: the endpoint in the run file of the cluster `name`, the token in its token file.

    `token_option` is the option that the error for a missing token suggests.

    Raises NotFound if there is no such cluster, Unauthenticated if there is no token, and InvalidRequest for a
    malformed address, or one beyond loopback without TLS.
    """
    token_path: Path | None = None
    if endpoint is None:
        run = find(name)
        endpoint, token_path = run.endpoint, Path(run.token_path)
    loopback = _is_loopback(endpoint)
    if not loopback and ca_cert is None:
        raise InvalidRequest(f"{endpoint} is not loopback, so the token would travel in the clear: pass ca_cert=")
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE) or _token_in_file(endpoint, token_path, token_option)
    return Endpoint(address=endpoint, token=token, loopback=loopback, ca_cert=_read(ca_cert))


def _is_loopback(endpoint: str) -> bool:
    match = _ADDRESS.fullmatch(endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise InvalidRequest(f"endpoint {endpoint!r} must have the form host:port, such as 127.0.0.1:50051")
    return is_loopback(match[1])


def _token_in_file(endpoint: str, token_path: Path | None, option: str) -> str:
    path = token_path or token_for_endpoint(endpoint)
    if path is None:
        raise Unauthenticated(
            f"no token for {endpoint}: you have no running cluster there. Pass {option}, or set {TOKEN_VARIABLE}"
        )
    return read_token(path)


def _read(ca_cert: str | os.PathLike[str] | None) -> bytes | None:
    if ca_cert is None:
        return None
    try:
        return Path(ca_cert).read_bytes()
    except OSError as error:
        raise NotFound(f"ca_cert {os.fspath(ca_cert)} cannot be read: {error.strerror}") from None
