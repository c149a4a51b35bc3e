"""Who may call what: roles, tokens in files only their owner can read, and a table of digests that decides."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

from ..experts.errors import ConfigError, NotFound, PermissionDenied, Unauthenticated

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Role(IntEnum):
    """What a token allows; a higher role may do all that a lower one may."""

    READER = 1
    OPERATOR = 2
    ADMIN = 3

    @classmethod
    def parse(cls, text: object) -> Role:
        """Read "reader", "operator" or "admin". Raises ConfigError."""
        for role in cls:
            if text == role.label:
                return role
        raise ConfigError(f"role must be one of {', '.join(_LABELS)}, not {text!r}")

    @property
    def label(self) -> str:
        """The role as files and messages write it."""
        return self.name.lower()


_LABELS = tuple(role.label for role in Role)

METHODS: Mapping[str, Role] = MappingProxyType(
    {
        "Call": Role.READER,
        "CallStream": Role.READER,
        "Status": Role.READER,
        "Check": Role.READER,
        "Watch": Role.READER,
        "SwapProgress": Role.READER,
        "History": Role.READER,
        "Pin": Role.READER,
        "Unpin": Role.READER,
        "Drain": Role.OPERATOR,
        "Upload": Role.OPERATOR,
        "Swap": Role.OPERATOR,
    }
)
"""The lowest role that may call each method; a method that is not here may be called by nobody.

A swap that names a factory needs an admin besides: `gateway_swap.py` sees to it.
"""


class Token(str):
    """A secret of 256 random bits that does not show itself in a repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Token(...)"


def new_token() -> Token:
    """A fresh token of 256 random bits."""
    return Token(secrets.token_urlsafe(32))


def token_digest(token: str) -> str:
    """The sha256 of a token in hex, which is all that a cluster stores of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def create_token_file(path: str | os.PathLike[str]) -> dict[Role, str]:
    """Write a fresh token for every role, one line `role token` each, readable by this user alone.

    The file appears whole or not at all, and replaces one that an earlier cluster left.
    """
    target = Path(path)
    tokens: dict[Role, str] = {role: new_token() for role in Role}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.writelines(f"{role.label} {token!s}\n" for role, token in tokens.items())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return tokens


def read_token(path: str | os.PathLike[str], role: Role | None = None) -> Token:
    """The token of `role` in a token file; by default that of the highest role in it.

    Raises NotFound where the file or the role is missing, and ConfigError for a file that is not of that form or that
    others than its owner can read.
    """
    found: dict[Role, Token] = {}
    for number, line in enumerate(_private_text(Path(path)).splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or words[0] not in _LABELS:  # the line is not shown: it may be a token
            raise ConfigError(f"{path}:{number}: a token file holds lines `role token`, roles are {', '.join(_LABELS)}")
        found[Role.parse(words[0])] = Token(words[1])
    wanted = max(found, default=None) if role is None else role
    if wanted is None or wanted not in found:
        raise NotFound(f"{path} holds no token{'' if wanted is None else f' for the role {wanted.label}'}")
    return found[wanted]


def _private_text(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is not a file")
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{path} belongs to another user: a token file must be your own")
            if status.st_mode & 0o077:
                raise ConfigError(f"others can read {path}, so its tokens are no secret: chmod 600 it, or start anew")
            return file.read(64 * 1024)
    except FileNotFoundError:
        raise NotFound(f"there is no token file {path}: is the cluster running?") from None
    except PermissionError:
        raise ConfigError(f"{path} cannot be read by this user: use a token of your own") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a token file: it holds bytes that are not ASCII") from None


@dataclass(frozen=True)
class _Entry:
    digest: str
    role: Role
    expires: float | None


class TokenTable:
    """The tokens that a cluster knows, as digests; it decides on every call and denies by default."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __repr__(self) -> str:
        return f"TokenTable({len(self._entries)} tokens)"

    def add(self, token: str, role: Role, expires: float | None = None) -> None:
        """Let `token` act as `role` until `expires` (seconds since 1970; None: for ever). Only its digest is kept."""
        self.add_digest(token_digest(token), role, expires)

    def add_digest(self, sha256: str, role: Role, expires: float | None = None) -> None:
        """Like `add`, for a token of which only the sha256 (64 hex digits) is known. Raises ConfigError."""
        check_digest(sha256)
        self._entries.append(_Entry(sha256, role, expires))

    def authorise(self, method: str, token: str | None, now: float) -> Role:
        """The role in which `token` may call `method` at the time `now`, in seconds since 1970.

        Every entry is compared, in constant time, so that the time taken tells nothing about the tokens.
        Raises Unauthenticated without a token that is known and valid, PermissionDenied where its role is too low or
        the method is unknown.
        """
        role = self._authenticate(token, now)
        needed = METHODS.get(method)
        if needed is None:
            raise PermissionDenied("no role may call this method: it is not one of this cluster's")
        if role < needed:
            raise PermissionDenied(f"{method} needs the role {needed.label}, this token has {role.label}")
        return role

    def _authenticate(self, token: str | None, now: float) -> Role:
        if not token:
            raise Unauthenticated("the call carries no token: give token=, or call as the user who runs the cluster")
        presented = token_digest(token)
        live: Role | None = None
        known = False
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, presented):
                known = True
                if entry.expires is None or now < entry.expires:
                    live = entry.role if live is None else max(live, entry.role)
        if live is not None:
            return live
        if known:
            raise Unauthenticated("the token has expired: ask for a new one")
        raise Unauthenticated("this cluster does not know the token: it may be of another cluster or an earlier start")


def check_digest(sha256: object) -> None:
    """Check that a digest is 64 lower-case hex digits. Raises ConfigError."""
    if not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
        raise ConfigError("sha256 must be the 64 lower-case hex digits of the token's sha256, never the token itself")
