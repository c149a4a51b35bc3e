"""Where a client calls and with which token: given, from the environment, or found in this user's run files."""

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
    """A server and what opens it. `ca_cert` is the PEM text that TLS trusts; None is a plain connection."""

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
    """Find what was not given: the endpoint in the run file of the cluster `name`, the token in its token file.

    `token_option` is what a caller who has no token is told to give.

    Raises NotFound when there is no such cluster, Unauthenticated when no token is found, InvalidRequest for an
    address that is none, or one beyond loopback without TLS.
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
