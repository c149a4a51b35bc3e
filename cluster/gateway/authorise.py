"""Authorises every call with a table of token digests, and denies by default."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from ...experts.errors import PermissionDenied, Unauthenticated
from ..machine.tokens import check_digest, token_digest
from ..rpc.methods import METHODS, Role

ID_DIGITS = 16
"""How many digits of its token's digest are the id of a caller."""


@dataclass(frozen=True)
class Caller:
    """Whose call it is: the role of the token, and an id of the token, which does not reveal it."""

    role: Role
    id: str = ""


class TokenTable:
    """The tokens of a cluster, as digests with role and expiry."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Role, float | None]] = []

    def __repr__(self) -> str:
        return f"TokenTable({len(self._entries)} tokens)"

    def add(self, sha256: str, role: Role, expires: float | None = None) -> None:
        """Add a token by its sha256, with `role`, valid until `expires` (seconds since 1970; None: for ever).

        Raises ConfigError for a digest that is not 64 hex digits.
        """
        check_digest(sha256)
        self._entries.append((sha256, role, expires))

    def knows(self, caller_id: str) -> bool:
        """Whether the token of this caller is one of the cluster's."""
        return any(sha256[:ID_DIGITS] == caller_id for sha256, _, _ in self._entries)

    def authorise(self, method: str, token: str | None, now: float) -> Role:
        """The role with which `token` may call `method` at the time `now`, in seconds since 1970.

        Compares every entry in constant time, so that the duration reveals nothing about the tokens.
        Raises Unauthenticated for a missing, unknown or expired token, and PermissionDenied if its role is too low or
        the method is unknown.
        """
        role = self._authenticate(token, now)
        required = METHODS.get(method)
        if required is None:
            raise PermissionDenied("no role may call this method: this cluster does not have it")
        if role < required:
            raise PermissionDenied(f"{method} needs the role {required.label}, but this token has {role.label}")
        return role

    def _authenticate(self, token: str | None, now: float) -> Role:
        if not token:
            raise Unauthenticated("the call carries no token: pass token=, or call as the user who runs the cluster")
        presented = token_digest(token)
        highest: Role | None = None
        known = False
        for digest, role, expires in self._entries:
            if hmac.compare_digest(digest, presented):
                known = True
                if expires is None or now < expires:
                    highest = role if highest is None else max(highest, role)
        if highest is not None:
            return highest
        if known:
            raise Unauthenticated("the token has expired: ask for a new one")
        raise Unauthenticated(
            "this cluster does not know the token: it may be from another cluster or an earlier start"
        )
