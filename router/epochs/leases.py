"""Leases: several calls of one client share an epoch for as long as the client keeps using it. Pure logic, no I/O.

A lease is a pin like that of a request, so the versions of its epoch stay loaded. It ends when it is given back, when
it goes unused for its time to live, and after `MAX_LIFE` at the latest, so that no old epoch is held forever. Once its
epoch is replaced it lasts `REPLACED_SECONDS` at most, however it is used: the next swap of that expert waits for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...experts.errors import FailedPrecondition, InvalidRequest, Overloaded
from .epochs import Epoch, Epochs

MAX_TTL = 60.0
MAX_LIFE = 600.0
MAX_LEASES = 1000
MAX_LEASES_OF_ONE = 250
REPLACED_SECONDS = 10.0


@dataclass
class _Lease:
    epoch: Epoch
    holder: str
    ttl: float
    began: float
    expires: float
    replaced: float | None = None

    def ends(self) -> float:
        return self.expires if self.replaced is None else min(self.expires, self.replaced + REPLACED_SECONDS)


class Leases:
    """The leases of a router; `clock` returns monotonic seconds, `check` raises where the epoch may be outdated."""

    def __init__(
        self,
        epochs: Epochs,
        clock: Callable[[], float],
        *,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._epochs = epochs
        self._clock = clock
        self._new_id = new_id
        self._check = check
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def lease(self, ttl: float, holder: str = "") -> tuple[str, Epoch, float]:
        """Lease the current epoch; returns the id of the lease, the epoch and the time to live in seconds.

        `ttl` is capped at 60 seconds; `holder` is whose lease it is, and may have a quarter of all. Raises
        InvalidRequest if `ttl` is not above 0, Unavailable before the first epoch, Overloaded if there are too many
        leases, and what `check` raises.
        """
        self._check()
        if not ttl > 0:
            raise InvalidRequest(f"ttl must be a number of seconds above 0, not {ttl:g}")
        self.drop_expired()
        held = sum(lease.holder == holder for lease in self._leases.values())
        if held >= MAX_LEASES_OF_ONE or len(self._leases) >= MAX_LEASES:
            raise Overloaded(
                f"your token holds {held} leases of at most {MAX_LEASES_OF_ONE}, and all tokens {len(self._leases)} of "
                f"at most {MAX_LEASES}: give back those that are no longer needed",
                retry_after=1.0,
            )
        ttl = min(ttl, MAX_TTL)
        epoch, now = self._epochs.pin(), self._clock()
        lease_id = self._new_id()
        self._leases[lease_id] = _Lease(epoch, holder, ttl, now, now + ttl)
        return lease_id, epoch, ttl

    def pin(self, lease_id: str) -> Epoch:
        """Pin the epoch of a lease for one request, and renew the lease.

        Raises FailedPrecondition if the lease has ended.
        """
        self.drop_expired()
        lease = self._leases.get(lease_id)
        if lease is None:
            raise FailedPrecondition(
                "the lease on an epoch has ended: it was not used, a swap replaced its epoch "
                f"{REPLACED_SECONDS:g} s ago, or its router has restarted; pin again"
            )
        lease.expires = min(self._clock() + lease.ttl, lease.began + MAX_LIFE)
        return self._epochs.pin_again(lease.epoch)

    def give_back(self, lease_id: str) -> bool:
        """End a lease; returns False if it has already ended."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._epochs.unpin(lease.epoch)
        return lease is not None

    def documents(self) -> list[dict[str, Any]]:
        """Every lease: its id, its epoch, whose it is, and the seconds since it began and until it ends if unused."""
        self.drop_expired()
        now = self._clock()
        return [
            {"pin": lease_id, "epoch": lease.epoch.number, "holder": lease.holder, "age": now - lease.began,
             "ends_in": lease.ends() - now}
            for lease_id, lease in self._leases.items()
        ]  # fmt: skip

    def drop_expired(self) -> int:
        """End the expired leases; returns their number. Called often, it notices when an epoch is replaced."""
        now = self._clock()
        for lease in self._leases.values():
            if lease.replaced is None and lease.epoch.number < self._epochs.number:
                lease.replaced = now
        expired = [lease_id for lease_id, lease in self._leases.items() if lease.ends() <= now]
        for lease_id in expired:
            self.give_back(lease_id)
        return len(expired)
