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

from .overload import CALL, mib
from .raw_http2 import RawConnection
from .scenario import Scenario, Seen

CONNECTIONS = 60
STREAM = 1
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
        before = mib(router)
        port = int(mesh.cluster.endpoint.rpartition(":")[2])
        peers: list[RawConnection] = []
        taken = 0
        with mesh.load(rate=50.0) as load:
            most = before
            for _ in range(CONNECTIONS):
                with suppress(OSError):
                    peers.append(RawConnection(port, patience=0.1))
                    taken += peers[-1].half_a_message(STREAM, CALL, MESSAGE_BYTES)
                most = max(most, mib(router))
            for _ in range(5):
                time.sleep(1)
                for peer in peers:
                    peer.listen()
                most = max(most, mib(router))
        refused = sum(peer.closed or STREAM in peer.ended for peer in peers)
        seen.note(f"{len(peers)} connections, {taken / 2**20:.0f} MiB taken without a token, {refused} of them refused")
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


SCENARIOS = (
    Scenario(
        "half-sent messages",
        f"the router grows by <= {ALLOWED_MIB} MiB, and 0 answers fail meanwhile",
        half_messages,
    ),
)
