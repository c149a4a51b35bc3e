"""The seam between router and replicas: one method. The in-process transport is the base case and ships here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..experts.errors import Unavailable
from ..experts.host import ExpertHost
from ..experts.protocol import ExpertCall, ExpertReply


class Transport(Protocol):
    """Carries one message to one replica and brings its reply."""

    async def send(self, replica_id: str, call: ExpertCall) -> ExpertReply:
        """Send and wait. Raises Unavailable when the replica is not there or dies before it answers."""


class LocalTransport:
    """Replicas as hosts in this process, each with one thread, so that slow experts do not wait for each other."""

    def __init__(self, hosts: Mapping[str, ExpertHost] | None = None) -> None:
        self._hosts: dict[str, ExpertHost] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        for replica_id, host in (hosts or {}).items():
            self.add(replica_id, host)

    def add(self, replica_id: str, host: ExpertHost) -> None:
        """Make a host reachable as a replica."""
        self._hosts[replica_id] = host
        self._threads[replica_id] = ThreadPoolExecutor(1, thread_name_prefix=f"expert-{replica_id}")

    def remove(self, replica_id: str) -> None:
        """Forget a replica; what it computes now it still finishes."""
        self._hosts.pop(replica_id, None)
        thread = self._threads.pop(replica_id, None)
        if thread is not None:
            thread.shutdown(wait=False)

    async def send(self, replica_id: str, call: ExpertCall) -> ExpertReply:
        """Compute in the thread of the host."""
        host, thread = self._hosts.get(replica_id), self._threads.get(replica_id)
        if host is None or thread is None:
            raise Unavailable("the replica is gone; retry")
        try:
            reply = asyncio.get_running_loop().run_in_executor(thread, host.compute, call)
        except RuntimeError:  # another thread has just shut it down
            raise Unavailable("the replica is gone; retry") from None
        return await reply

    def close(self) -> None:
        """Stop every thread; idempotent."""
        for replica_id in list(self._hosts):
            self.remove(replica_id)
