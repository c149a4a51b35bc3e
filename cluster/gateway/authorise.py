"""Who may call what: a table of digests of tokens that decides on every call, and denies by default."""

from __future__ import annotations

import hmac

from ...experts.errors import PermissionDenied, Unauthenticated
from ..machine.tokens import check_digest, token_digest
from ..rpc.methods import METHODS, Role


class TokenTable:
    """The tokens that a cluster knows, as digests; it decides on every call and denies by default."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Role, float | None]] = []

    def __repr__(self) -> str:
        return f"TokenTable({len(self._entries)} tokens)"

    def add(self, sha256: str, role: Role, expires: float | None = None) -> None:
        """Let the token with this sha256 act as `role` until `expires` (seconds since 1970; None: for ever).

        Raises ConfigError for a digest that is not 64 hex digits.
        """
        check_digest(sha256)
        self._entries.append((sha256, role, expires))

    def authorise(self, method: str, token: str | None, now: float) -> Role:
        """The role in which `token` may call `method` at the time `now`, in seconds since 1970.

        Every entry is compared, in constant time, so that the time taken tells nothing about the tokens.
        Raises Unauthenticated without a token that is known and valid, PermissionDenied where its role is too low or
        the method is unknown.
        """
        role = self._authenticate(token, now)
        needed = METHODS.get(method)
        if needed is None:
            raise PermissionDenied("no role may call this method: this cluster does not have it")
        if role < needed:
            raise PermissionDenied(f"{method} needs the role {needed.label}, but this token has {role.label}")
        return role

    def _authenticate(self, token: str | None, now: float) -> Role:
        if not token:
            raise Unauthenticated("the call carries no token: pass token=, or call as the user who runs the cluster")
        presented = token_digest(token)
        live: Role | None = None
        known = False
        for digest, role, expires in self._entries:
            if hmac.compare_digest(digest, presented):
                known = True
                if expires is None or now < expires:
                    live = role if live is None else max(live, role)
        if live is not None:
            return live
        if known:
            raise Unauthenticated("the token has expired: ask for a new one")
        raise Unauthenticated(
            "this cluster does not know the token: it may be from another cluster or an earlier start"
        )
