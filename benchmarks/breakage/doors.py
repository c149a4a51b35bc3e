"""Messages that are half-sent by a peer without a token, beside calls that go on.

Where the machine lets us (root, cgroups of version 1), the router is put into a group of 3 GiB first: a leak then ends
it rather than the machine.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil
from benchmarks.chaos.figures import judged
from benchmarks.chaos.mesh import chaos_mesh, processes

from .half_sent import HalfSent
from .overload import CALL
from .scenario import Scenario, Seen

CONNECTIONS = 60
MESSAGE_BYTES = 60 << 20
ALLOWED_MIB = 512
GROUP = Path("/sys/fs/cgroup/memory/expertmesh-breakage")
GROUP_BYTES = 3 << 30


def half_messages() -> Seen:
    """Many connections, each with a message of which the last byte is missing."""
    seen = Seen()
    with chaos_mesh("half-sent", experts=2, replicas=1) as mesh:
        (router,) = processes("RouterActor")
        seen.note("the router has 3 GiB" if _confine(router) else "no memory group could be made here")
        before = _mib(router)
        host, _, port = mesh.cluster.endpoint.rpartition(":")
        peers: list[HalfSent] = []
        with mesh.load(rate=50.0) as load:
            most = before
            for _ in range(CONNECTIONS):
                with suppress(OSError):
                    peers.append(HalfSent(host, int(port), CALL, MESSAGE_BYTES))
                    peers[-1].send(3.0)
                most = max(most, _mib(router))
            for _ in range(5):
                time.sleep(1)
                for peer in peers:
                    peer.listen(0.0)
                most = max(most, _mib(router))
        sent = sum(peer.sent for peer in peers) / 2**20
        still = sum(not peer.closed for peer in peers)
        seen.note(f"{len(peers)} connections, {sent:.0f} MiB taken without a token, {still} still open")
        seen.note(f"router's memory {before:.0f} -> {most:.0f} MiB", most - before <= ALLOWED_MIB)
        seen.note("the router lives on", router.is_running())
        for peer in peers:
            peer.close()
        found = judged(mesh.checker(), load)
        bad = found["failed"] + found["wrong"] + found["mixed"]
        seen.note(f"{found['requests']} answers meanwhile: {found['failed']} failed, {found['wrong']} wrong", not bad)
    _release()
    return seen


def _confine(process: psutil.Process) -> bool:
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(GROUP_BYTES))
        (GROUP / "cgroup.procs").write_text(str(process.pid))
    except OSError:
        return False
    return True


def _release() -> None:
    with suppress(OSError):
        GROUP.rmdir()


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


SCENARIOS = (
    Scenario(
        "half-sent messages",
        f"the router grows by <= {ALLOWED_MIB} MiB, and 0 answers fail meanwhile",
        half_messages,
    ),
)
