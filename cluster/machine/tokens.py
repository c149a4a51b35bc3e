"""Token files: one token per role, readable only by their owner."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

from ...experts.errors import ConfigError, NotFound
from ..rpc.methods import Role
from .durable_files import write_private

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LABELS = tuple(role.label for role in Role)


class Token(str):
    """A secret that its repr does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Token(...)"


def new_token() -> Token:
    """A new token of 256 random bits."""
    return Token(secrets.token_urlsafe(32))


def token_digest(token: str) -> str:
    """The sha256 of a token in hex; a cluster stores nothing else of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def create_token_file(path: str | os.PathLike[str]) -> dict[Role, str]:
    """Write a new token for every role, one line `role token` each, readable by this user alone.

    The file is written atomically, and replaces that of an earlier cluster.
    """
    tokens: dict[Role, str] = {role: new_token() for role in Role}
    write_private(Path(path), "".join(f"{role.label} {token!s}\n" for role, token in tokens.items()))
    return tokens


def read_token(path: str | os.PathLike[str], role: Role | None = None) -> Token:
    """The token of `role` in a token file; by default, that of the highest role in it.

    Raises NotFound if the file or the role is missing, and ConfigError if the file is malformed or readable by others
    than its owner.
    """
    tokens = read_tokens(path)
    role = max(tokens, default=None) if role is None else role
    if role is None or role not in tokens:
        raise NotFound(f"{path} holds no token{'' if role is None else f' for the role {role.label}'}")
    return tokens[role]


def read_tokens(path: str | os.PathLike[str]) -> dict[Role, Token]:
    """The tokens of a token file by role.

    Raises NotFound if the file is missing, and ConfigError if it is malformed or readable by others than its owner.
    """
    tokens: dict[Role, Token] = {}
    for number, line in enumerate(_private_text(Path(path)).splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or words[0] not in _LABELS:  # the line is not shown: it may be a token
            raise ConfigError(f"{path}:{number}: each line must be `role token`, with a role of {', '.join(_LABELS)}")
        tokens[Role.parse(words[0])] = Token(words[1])
    return tokens


def _private_text(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is not a file")
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{path} belongs to another user: a token file must be your own")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"others can read {path}, so its tokens are not secret: chmod 600 it, or restart the cluster"
                )
            return file.read(64 * 1024)
    except FileNotFoundError:
        raise NotFound(f"there is no token file {path}: is the cluster running?") from None
    except PermissionError:
        raise ConfigError(f"{path} cannot be read by this user: use a token of your own") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a token file: it holds bytes that are not ASCII") from None


def check_digest(sha256: object) -> None:
    """Check that a digest is 64 lower-case hex digits. Raises ConfigError."""
    if not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
        raise ConfigError("sha256 must be the 64 lower-case hex digits of the token's sha256, never the token itself")
