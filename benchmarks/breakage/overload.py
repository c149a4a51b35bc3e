"""More requests than a cluster can answer: three times its capacity, and ten thousand at once.

The open loop sends frames that were encoded beforehand, through gRPC alone, so that the sender is not what is measured;
it retries nothing, so every status is the cluster's own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import psutil
from benchmarks.chaos.exact import Array, rows
from benchmarks.chaos.figures import quantile
from benchmarks.chaos.mesh import Mesh, chaos_mesh, processes

from expertmesh import AsyncClient, errors
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.rpc.channel_options import client_options
from expertmesh.experts.wire import WireTensor, encode

from .scenario import Scenario, Seen

CALL = "/expertmesh.v1.Mesh/Call"
ROWS = 64
DEADLINE = 2.0
LOAD_SECONDS = 60.0
TIMES = 3.0
CONNECTIONS = 4


@dataclass(frozen=True)
class Ended:
    """One call: when it was sent, how long it took (seconds), and the name of its status."""

    sent: float
    seconds: float
    code: str


class Sender:
    """Sends the same encoded call over several connections."""

    def __init__(self, mesh: Mesh) -> None:
        frame = WireTensor.from_numpy(mesh_rows())
        self._request = encode("call", {"layer": mesh.shape.layer}, {"x": frame})
        self._metadata = (("authorization", f"Bearer {reader_token(mesh)}"),)
        options = [*client_options(), ("grpc.use_local_subchannel_pool", 1)]
        target = mesh.cluster.endpoint
        self._channels = [grpc.insecure_channel(target, options=options) for _ in range(CONNECTIONS)]
        self._calls = [channel.unary_unary(CALL) for channel in self._channels]
        self._sent = 0

    def closed_loop(self, seconds: float, callers: int = 32) -> float:
        """The answers a second that so many callers get."""
        end = time.monotonic() + seconds
        counts = [0] * callers

        def one(place: int) -> None:
            call = self._calls[place % CONNECTIONS]
            while time.monotonic() < end:
                call(self._request, timeout=DEADLINE * 5, metadata=self._metadata)
                counts[place] += 1

        threads = [threading.Thread(target=one, args=(place,)) for place in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / seconds

    def open_loop(self, rate: float, seconds: float) -> list[Ended]:
        """Send so many calls a second whatever comes back, and wait for the last answer."""
        ended: list[Ended] = []
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            for _ in range(min(50, int(now * rate) - sent)):
                self._send(ended)
                sent += 1
            time.sleep(0.001)
        deadline = time.monotonic() + 5 * DEADLINE
        while len(ended) < sent and time.monotonic() < deadline:
            time.sleep(0.02)
        return ended + [Ended(0.0, 5 * DEADLINE, "no answer")] * (sent - len(ended))

    def _send(self, ended: list[Ended]) -> None:
        sent = time.monotonic()
        call = self._calls[self._sent % CONNECTIONS]
        self._sent += 1
        future = call.future(self._request, timeout=DEADLINE, metadata=self._metadata)
        future.add_done_callback(lambda done: ended.append(Ended(sent, time.monotonic() - sent, done.code().name)))

    def one(self) -> float:
        """The seconds that one call takes."""
        began = time.monotonic()
        self._calls[0](self._request, timeout=20.0, metadata=self._metadata)
        return time.monotonic() - began

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()


def three_times() -> Seen:
    """An open loop at three times the capacity."""
    seen = Seen()
    with chaos_mesh("overload", experts=2, replicas=1) as mesh:
        sender = Sender(mesh)
        sender.closed_loop(2.0)
        capacity = sender.closed_loop(6.0)
        peak = _goodput(sender.open_loop(0.95 * capacity, 5.0), 5.0)
        best = max(peak, capacity)
        seen.note(f"capacity {capacity:.0f} calls/s of {ROWS} rows (32 callers), {peak:.0f} in the open loop")
        (router,) = processes("RouterActor")
        before = mib(router)
        ended = sender.open_loop(TIMES * best, LOAD_SECONDS)
        over = time.monotonic()
        offered = len(ended) / LOAD_SECONDS / best
        share = _goodput(ended, LOAD_SECONDS) / best
        seen.note(f"goodput {share:.2f} of peak at {offered:.1f} times the load for {LOAD_SECONDS:g} s", share >= 0.9)
        codes = Counter(one.code for one in ended)
        seen.note(", ".join(f"{number} {code}" for code, number in codes.most_common()), not codes["CANCELLED"])
        refused = [one.seconds for one in ended if one.code == "RESOURCE_EXHAUSTED"]
        p99 = 1000 * quantile(refused, 0.99) if refused else float("nan")
        seen.note(f"refusals p99 {p99:.0f} ms", p99 <= 100)
        seen.note(f"router's memory {before:.0f} -> {mib(router):.0f} MiB")
        normal = _recovery(sender, over)
        seen.note(f"back to normal after {normal:.2f} s", normal <= 1.0)
        sender.close()
    return seen


def ten_thousand() -> Seen:
    """Ten thousand calls of one client at once."""
    seen = Seen()
    with chaos_mesh("ten-thousand", experts=2, replicas=1) as mesh:
        for number in (2_000, 10_000):
            began = time.monotonic()
            counts = asyncio.run(_at_once(mesh, number))
            kinds = ", ".join(f"{times} {kind}" for kind, times in counts.most_common(4))
            lost = number - counts["ok"] - counts["Overloaded"]
            seen.note(f"{number} at once: {kinds} in {time.monotonic() - began:.1f} s", lost == 0)
    return seen


async def _at_once(mesh: Mesh, number: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    x = mesh_rows()[:2]
    async with AsyncClient(mesh.cluster.endpoint, timeout=60.0) as client:

        async def one() -> None:
            try:
                await client.call(mesh.shape.layer, x)
                counts["ok"] += 1
            except errors.ExpertMeshError as error:
                counts[type(error).__name__] += 1

        await asyncio.gather(*(one() for _ in range(number)))
    return counts


def mesh_rows() -> Array:
    """Rows [ROWS, width] of the layer."""
    return rows(0, ROWS)


def reader_token(mesh: Mesh) -> str:
    """The reader's token of a cluster on this machine."""
    lines = token_path(str(mesh.settings["name"])).read_text().split("\n")
    return next(token for role, token in (line.split() for line in lines if line) if role == "reader")


def _goodput(ended: Sequence[Ended], seconds: float) -> float:
    return sum(one.code == "OK" for one in ended) / seconds


def mib(process: psutil.Process) -> float:
    """The memory of a process, in MiB."""
    return float(process.memory_info().rss) / 2**20


def _recovery(sender: Sender, since: float, usual: float = 0.1) -> float:
    """Seconds from a moment until a call takes the usual time again."""
    for _ in range(100):
        if sender.one() < usual:
            break
    return time.monotonic() - since


SCENARIOS = (
    Scenario(
        "overload 3x",
        "goodput >= 0.90 of peak, refusals p99 <= 100 ms, 0 CANCELLED, normal within 1 s",
        three_times,
    ),
    Scenario("10,000 calls at once", "each is answered or refused as Overloaded", ten_thousand),
)
