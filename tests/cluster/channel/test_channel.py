"""The direct channel between real sockets: right answers, and strangers, liars and slow readers that harm nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.router_in_process import load
from helpers.waiting import run_async, until
from torch import Tensor

from expertmesh.cluster.channel import replica_end as module
from expertmesh.cluster.channel.messages import LENGTH, ROUTER, encode_call, message, proof
from expertmesh.cluster.channel.messages import REPLICA as REPLICA_ROLE
from expertmesh.cluster.channel.replica_end import CREDITS, ChannelServer, socket_path
from expertmesh.cluster.channel.router_end import ChannelTransport
from expertmesh.experts.errors import ExpertFailed, ExpertMeshError, Unavailable
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import ExpertCall, ExpertReply, Part, PartFailure
from expertmesh.experts.spec import Expert
from expertmesh.experts.wire import decode
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.transport import Died

SECRET = b"a secret of thirty-two bytes, ok"
ROWS = torch.arange(12.0).reshape(3, 4)
HELD = threading.Event()


def held(rows: Tensor) -> Tensor:
    """An expert that computes when the test lets it."""
    HELD.wait(30)
    return rows


class Served:
    """A host behind a channel of its own."""

    def __init__(self, folder: Path, kind: str = "unix", expert: Expert | None = None) -> None:
        self.host = ExpertHost()
        self.version = load(self.host, "l/e", expert or Expert("torch:sin")).version
        self.server = ChannelServer(self.host, "r", SECRET)
        if kind == "unix":
            self.server.listen_unix(socket_path(folder, "r", self.host.incarnation))
        else:
            self.server.listen_tcp("127.0.0.1")

    def counts(self, name: str, number: int = 1) -> bool:
        return self.server.counted[name] >= number

    def replica(self, incarnation: str | None = None) -> Replica:
        return Replica("r", ("l/e",), incarnation or self.host.incarnation, state=READY, address=self.server.address)

    def call(self, attempt: int = 1, rows: Tensor = ROWS, **options: Any) -> ExpertCall:
        return ExpertCall(attempt, (Part("l/e", self.version, 0, rows.shape[0]),), rows, **options)


@pytest.fixture(params=["unix", "tcp"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, request.param)
    yield made
    made.server.close()
    assert not list(tmp_path.glob("*-*"))


@contextlib.contextmanager
def waiting_expert(folder: Path) -> Iterator[Served]:
    HELD.clear()
    made = Served(folder, expert=Expert.from_function(held))
    try:
        yield made
    finally:
        HELD.set()
        made.server.close()


class Router:
    """The other end: a transport that asks one replica."""

    def __init__(self, replica: Replica, secret: bytes = SECRET) -> None:
        self.replica = replica
        self.lost: list[str] = []
        self.transport = ChannelTransport(secret)
        self.refresh()

    def refresh(self, *replicas: Replica) -> None:
        self.transport.refresh(replicas or [self.replica], lambda replica: self.lost.append(replica.incarnation))

    def send(self, call: ExpertCall) -> tuple[asyncio.Future[Any], Callable[[], object]]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return answer, self.transport.send(self.replica, call, answer.set_result)

    async def ask(self, call: ExpertCall) -> Tensor:
        reply = await asyncio.wait_for(self.send(call)[0], 20)
        if isinstance(reply, ExpertMeshError):
            raise reply
        assert isinstance(reply, ExpertReply)
        (output,) = reply.outputs
        if isinstance(output, PartFailure):
            raise ExpertMeshError(f"{output.error}: {output.message}")
        assert isinstance(output, Tensor)
        return output


def connect(address: str) -> socket.socket:
    kind, _, where = address.partition(":")
    if kind == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(where)
    else:
        host, _, port = where.rpartition(":")
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(20)
    return connection


def read(connection: socket.socket) -> Any:
    size = LENGTH.unpack(connection.recv(LENGTH.size, socket.MSG_WAITALL))[0]
    return decode(connection.recv(size, socket.MSG_WAITALL))


def known(served: Served, router: str = "router-0/s") -> socket.socket:
    """A connection that has proved the secret, by hand."""
    connection = connect(served.server.address)
    hello = read(connection).meta
    mine = proof(SECRET, ROUTER, hello["incarnation"], (hello["nonce"], "n"))
    connection.sendall(b"".join(message("prove", nonce="n", proof=mine, router=router)))
    assert read(connection).kind == "welcome"
    return connection


def is_closed(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_rows_come_back_computed_and_the_way_is_counted(served: Served) -> None:
    async def main() -> None:
        router = Router(served.replica())
        for rows in (ROWS, ROWS[:0], torch.randn(5000, 700), ROWS.bfloat16(), ROWS.double()):
            assert torch.equal(await router.ask(served.call(rows=rows)), rows.sin())
        kind = served.server.address.partition(":")[0]
        assert router.transport.carried == {kind: 3 + 5000 + 3 + 3}
        router.transport.close()

    run_async(main())


def test_routers_on_the_node_of_a_replica_reach_it_by_its_socket_and_others_over_tcp(tmp_path: Path) -> None:
    async def main() -> None:
        made = Served(tmp_path)
        server = ChannelServer(made.host, "r", SECRET)
        server.listen_unix(tmp_path / "both", also_on="127.0.0.1")
        both = replace(made.replica(), address=server.address, tcp_address=server.tcp_address, node="10.0.0.1/ab")
        for node, way in (("10.0.0.1/ab", "unix"), ("10.0.0.2/cd", "tcp")):
            router = Router(both)
            router.transport = ChannelTransport(SECRET, node=node)
            router.refresh()
            assert torch.equal(await router.ask(made.call()), ROWS.sin())
            assert router.transport.carried == {way: 3}
            router.transport.close()
        server.close()
        made.server.close()
        assert not list(tmp_path.iterdir())

    run_async(main())


def test_a_wrong_secret_is_refused_by_both_ends_and_harms_nobody(served: Served) -> None:
    async def main() -> None:
        good, bad = Router(served.replica()), Router(served.replica(), b"another secret of 32 bytes, oops")
        with pytest.raises(Unavailable):
            await bad.ask(served.call())
        assert served.server.counted["refused"] == 1
        assert served.server.counted["computed"] == 0
        assert torch.equal(await good.ask(served.call()), ROWS.sin())
        for router in (good, bad):
            router.transport.close()

    run_async(main())


def test_a_listener_without_the_secret_gets_no_row(tmp_path: Path) -> None:
    async def main() -> None:
        got: list[bytes] = []
        path = tmp_path / "liar"

        async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"".join(message("hello", replica="r", incarnation="i", nonce="n")))
            got.append(await reader.read(65536))
            writer.write(b"".join(message("welcome", proof="0" * 64, credits="4")))
            got.append(await reader.read(65536))
            writer.close()

        async with await asyncio.start_unix_server(lie, str(path)):
            router = Router(Replica("r", ("l/e",), "i", state=READY, address=f"unix:{path}"))
            with pytest.raises(Unavailable):
                await router.ask(ExpertCall(1, (Part("l/e", "v1", 0, 3),), ROWS))
            await asyncio.sleep(0.05)
        assert b"prove" in got[0]
        assert got[1:] == [b""]

    run_async(main())


def test_another_incarnation_is_not_spoken_to(served: Served) -> None:
    async def main() -> None:
        router = Router(served.replica(incarnation="of yesterday"))
        with pytest.raises(Unavailable):
            await router.ask(served.call())
        assert served.server.counted["computed"] == 0
        router.transport.close()

    run_async(main())


def test_an_actor_that_was_replaced_but_still_answers_is_not_heard(tmp_path: Path) -> None:
    async def main() -> None:
        with waiting_expert(tmp_path) as old:
            router = Router(old.replica())
            answer, _ = router.send(old.call())
            while not old.server.counted["computed"]:
                await asyncio.sleep(0.01)
            router.refresh(Replica("r", ("l/e",), "the next", state=READY, address=f"unix:{tmp_path}/nobody"))
            HELD.set()
            assert isinstance(await asyncio.wait_for(answer, 20), Died)
            router.transport.close()

    run_async(main())


@pytest.mark.parametrize("garbage", [b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", LENGTH.pack(2**63), LENGTH.pack(0), b"x"])
def test_garbage_is_closed_without_harm(served: Served, garbage: bytes) -> None:
    async def main() -> None:
        router = Router(served.replica())
        await router.ask(served.call())
        stranger = connect(served.server.address)
        with contextlib.suppress(OSError):  # it may be closed before all of it is there
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(is_closed, stranger)
        assert torch.equal(await router.ask(served.call(2)), ROWS.sin())
        router.transport.close()

    run_async(main())


def test_who_does_not_prove_itself_in_time_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRANGER_SECONDS", 0.2)

    async def main() -> None:
        router = Router(served.replica())
        await router.ask(served.call())
        strangers = [connect(served.server.address) for _ in range(5)]
        for stranger in strangers:
            assert await asyncio.to_thread(is_closed, stranger)
        assert served.server.counted["stranger"] == 5
        assert torch.equal(await router.ask(served.call(2)), ROWS.sin())
        router.transport.close()

    run_async(main())


def test_strangers_take_only_so_many_places(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRANGERS", 3)

    async def main() -> None:
        router = Router(served.replica())
        await router.ask(served.call())
        strangers = [connect(served.server.address) for _ in range(8)]
        for stranger in strangers[:5]:
            assert await asyncio.to_thread(is_closed, stranger)
        assert torch.equal(await router.ask(served.call(2)), ROWS.sin())
        for stranger in strangers:
            stranger.close()
        router.transport.close()

    run_async(main())


def test_who_does_not_read_is_closed_and_the_others_are_served(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.5)

    async def main() -> None:
        router = Router(served.replica())
        lazy = known(served)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        large = torch.zeros(4000, 1000)
        await asyncio.to_thread(lazy.sendall, b"".join(encode_call(served.call(1, large))))
        while not served.server.counted["stalled"]:
            assert torch.equal(await router.ask(served.call(2)), ROWS.sin())
            await asyncio.sleep(0.05)
        lazy.close()
        router.transport.close()

    run_async(main())


@pytest.mark.parametrize("session", ["s", ""])
def test_a_router_that_was_given_up_gets_no_answer_any_more_and_is_told(tmp_path: Path, session: str) -> None:
    """By its session, or, where none is known, by its name; another router, and a later session, are served."""
    with waiting_expert(tmp_path) as made:
        frozen, other = known(made, "router-0/s"), known(made, "router-1/t")
        for connection in (frozen, other):
            connection.sendall(b"".join(encode_call(made.call())))
        made.server.refuse({"router-0": session})
        HELD.set()
        assert read(frozen).kind == "refused"
        assert is_closed(frozen)
        assert read(other).kind == "reply"
        back = known(made, "router-0/u")
        back.sendall(b"".join(encode_call(made.call())))
        assert read(back).kind == "reply"
        again = connect(made.server.address)
        hello = read(again).meta
        mine = proof(SECRET, ROUTER, hello["incarnation"], (hello["nonce"], "n"))
        again.sendall(b"".join(message("prove", nonce="n", proof=mine, router="router-0/s")))
        assert read(again).kind == "refused"


def test_a_router_hears_that_it_was_given_up_and_is_served_under_its_next_session(tmp_path: Path) -> None:
    async def main(made: Served) -> None:
        router, refused = Router(made.replica()), asyncio.Event()
        router.transport.identify("router-0/s", refused.set)
        router.refresh()
        assert (await router.ask(made.call())).shape == made.call().rows.shape
        answer, _ = router.send(made.call())
        made.server.refuse({"router-0": "s"})
        await asyncio.wait_for(refused.wait(), 20)
        assert isinstance(await answer, Unavailable | ExpertReply)
        router.transport.identify("router-0/u", refused.set)
        router.refresh()
        assert (await router.ask(made.call())).shape == made.call().rows.shape

    made = Served(tmp_path)
    try:
        asyncio.run(main(made))
    finally:
        made.server.close()


def test_more_calls_than_credits_close_the_connection(tmp_path: Path) -> None:
    with waiting_expert(tmp_path) as made:
        greedy = known(made)
        for attempt in range(CREDITS + 2):
            greedy.sendall(b"".join(encode_call(made.call(attempt))))
        HELD.set()
        assert is_closed(greedy)


def test_what_waits_is_bounded_and_routers_take_turns_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, routers, rows = 10, 6, 3
    monkeypatch.setattr(module, "MOST_QUEUED_ROWS", most)
    computed: list[int] = []
    queued: list[int] = []

    def counting(x: Tensor) -> Tensor:
        HELD.wait(30)
        computed.append(int(x[0, 0]))
        queued.append(made.server.queued_rows())
        return x

    HELD.clear()
    made = Served(tmp_path, expert=Expert.from_function(counting))
    try:
        stuck = known(made)
        stuck.sendall(b"".join(encode_call(made.call()))[:-1])  # a router that stops in the middle of a message
        known_routers = [known(made) for _ in range(routers)]
        for attempt in range(CREDITS):  # in rounds: who comes late has no turn to lose
            for number, router in enumerate(known_routers):
                router.sendall(b"".join(encode_call(made.call(attempt, torch.full((rows, 4), float(number))))))
        HELD.set()
        for router in known_routers:
            assert {read(router).meta["attempt"] for _ in range(CREDITS)} == set(range(CREDITS))
    finally:
        HELD.set()
        made.server.close()
    assert max(queued) < most + rows  # and not all that was sent
    assert len(computed) == routers * CREDITS
    for turn in range(1, CREDITS):  # nobody has two calls more computed than another
        sofar = [computed[: turn * routers].count(number) for number in range(routers)]
        assert max(sofar) - min(sofar) <= 1, computed


@pytest.mark.parametrize(
    "call",
    [
        ExpertCall(1, (Part("l/e", "v1", 0, 4),), ROWS),
        ExpertCall(1, (Part("l/e", "v1", 0, 1),), ROWS, torch.tensor([3])),
        ExpertCall(1, (Part("l/e", "v1", 0, 1),), ROWS, torch.tensor([-1])),
    ],
)
def test_a_call_that_points_outside_of_its_rows_is_closed(served: Served, call: ExpertCall) -> None:
    peer = known(served)
    peer.sendall(b"".join(encode_call(call)))
    assert is_closed(peer)
    assert served.server.counted["malformed"] == 1


def test_what_was_cancelled_or_came_too_late_is_not_computed(tmp_path: Path) -> None:
    async def main() -> None:
        with waiting_expert(tmp_path) as made:
            router = Router(made.replica())
            first, _ = router.send(made.call(1))
            while not made.server.counted["computed"]:
                await asyncio.sleep(0.01)
            _, cancel = router.send(made.call(2))
            late, _ = router.send(made.call(3, timeout=0.0))
            cancel()
            HELD.set()
            assert isinstance(await asyncio.wait_for(first, 20), ExpertReply)
            (failure,) = (await asyncio.wait_for(late, 20)).outputs
            assert failure.error == "DeadlineExceeded"
            assert made.server.counted == {"computed": 1, "cancelled": 1, "expired": 1}
            router.transport.close()

    run_async(main())


def test_a_late_answer_never_lands_in_another_requests_rows(tmp_path: Path) -> None:
    async def main() -> None:
        with waiting_expert(tmp_path) as made:
            router = Router(made.replica())
            gone, cancel = router.send(made.call(1, ROWS + 100))
            while not made.server.counted["computed"]:
                await asyncio.sleep(0.01)
            cancel()  # it is being computed, so its answer will come all the same
            answer, _ = router.send(made.call(2))
            HELD.set()
            reply = await asyncio.wait_for(answer, 20)
            assert torch.equal(reply.outputs[0], ROWS)
            assert router.transport._channels["r"].late == 1
            assert not gone.done()
            router.transport.close()

    run_async(main())


def test_a_failure_of_the_expert_is_told_and_the_connection_stays(tmp_path: Path) -> None:
    async def main() -> None:
        made = Served(tmp_path, expert=Expert("helpers.samples:raises"))
        router = Router(made.replica())
        for attempt in (1, 2):
            with pytest.raises(ExpertMeshError, match="ExpertFailed: l/e raised ZeroDivisionError"):
                await router.ask(made.call(attempt))
        router.transport.close()
        made.server.close()

    run_async(main())


@pytest.mark.parametrize("factory", ["panics", "interrupts", "leaves", "sparse", "deep", "complex_rows"])
def test_nothing_that_an_expert_does_ends_the_thread_that_serves_the_others(tmp_path: Path, factory: str) -> None:
    async def main() -> None:
        made = Served(tmp_path, expert=Expert(f"helpers.samples:{factory}"))
        good = load(made.host, "l/good", Expert("torch:sin")).version
        router = Router(made.replica())
        for attempt in (1, 3):
            with pytest.raises(ExpertMeshError, match="ExpertFailed: l/e"):
                await router.ask(made.call(attempt))
            call = ExpertCall(attempt + 1, (Part("l/good", good, 0, 3),), ROWS)
            assert torch.equal(await router.ask(call), ROWS.sin())
        assert not router.lost
        router.transport.close()
        made.server.close()

    run_async(main())


def raises_at_length(rows: Tensor) -> Tensor:
    raise ExpertFailed(f"{float(rows[0, 0])}" + "\ud800\N{GRINNING FACE}" * 500)


@pytest.mark.parametrize("parts", [1, 256])
def test_an_error_that_cannot_be_sent_is_told_all_the_same(tmp_path: Path, parts: int) -> None:
    async def main() -> None:
        made = Served(tmp_path, expert=Expert.from_function(raises_at_length))
        router = Router(made.replica())
        asked = tuple(Part("l/e", made.version, row, row + 1) for row in range(parts))
        reply = await asyncio.wait_for(router.send(ExpertCall(1, asked, torch.arange(256.0)[:, None]))[0], 20)
        assert {output.error for output in reply.outputs} == {"ExpertFailed"}
        assert not router.lost
        router.transport.close()
        made.server.close()

    run_async(main())


def widths(rows: Tensor) -> Tensor:
    return rows.expand(1, int(rows[0, 0]))


def test_more_shapes_than_a_reply_can_carry_fail_only_what_does_not_fit(tmp_path: Path) -> None:
    async def main() -> None:
        made = Served(tmp_path, expert=Expert.from_function(widths))
        router = Router(made.replica())
        asked = tuple(Part("l/e", made.version, row, row + 1) for row in range(20))
        reply = await asyncio.wait_for(router.send(ExpertCall(1, asked, torch.arange(20.0)[:, None]))[0], 20)
        for width, output in enumerate(reply.outputs):
            if width < 15:
                assert torch.equal(output, torch.full((1, width), float(width)))
            else:
                assert output == PartFailure("ExpertFailed", "the answers of one message have more than 15 shapes")
        router.transport.close()
        made.server.close()

    run_async(main())


def test_an_expert_that_answers_from_one_buffer_gives_everyone_their_own_rows(tmp_path: Path) -> None:
    """The answers are larger than what the kernel takes, so that one is being sent while the next is computed."""
    buffer = torch.zeros(64, 400_000)

    def fills(rows: Tensor) -> Tensor:
        return buffer[: len(rows)].copy_(rows[:, :1].expand(len(rows), buffer.shape[1]))

    async def main() -> None:
        made = Served(tmp_path, expert=Expert.from_function(fills))
        router = Router(made.replica())
        asked = [made.call(number, torch.full((8, 1), float(number))) for number in range(1, CREDITS + 1)]
        replies = await asyncio.wait_for(asyncio.gather(*(router.send(call)[0] for call in asked)), 60)
        for call, reply in zip(asked, replies, strict=True):
            assert set(reply.outputs[0].unique().tolist()) == {float(call.attempt)}
        router.transport.close()
        made.server.close()

    run_async(main())


def test_a_thread_that_ends_is_a_replica_that_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        made = Served(tmp_path)
        told: list[str] = []
        monkeypatch.setattr(made.server, "_failed", told.append)
        router = Router(made.replica())
        await router.ask(made.call())
        monkeypatch.setattr(made.server, "_next", lambda: (_ for _ in ()).throw(MemoryError()))
        assert isinstance(await asyncio.wait_for(router.send(made.call(2))[0], 20), Died)
        await until(lambda: router.lost)
        assert told == ["its channel ended with MemoryError"]
        router.transport.close()
        made.server._thread.join(20)
        made.server.close()  # what would wake the thread is closed

    run_async(main())


def test_a_reply_that_cannot_be_read_ends_the_call_and_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "odd"

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def read() -> Any:
                return decode(await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]))

            writer.write(b"".join(message("hello", replica="r", incarnation="i", nonce="n")))
            nonces = ("n", (await read()).meta["nonce"])
            writer.write(b"".join(message("welcome", proof=proof(SECRET, REPLICA_ROLE, "i", nonces), credits="4")))
            await read()
            odd = {"outputs": [[0, "many"]], "sums": [], "failures": [], "seconds": [0.0, 0.0]}
            writer.write(b"".join(message("reply", attempt=1, **odd)))
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(answer, str(path)):
            router = Router(Replica("r", ("l/e",), "i", state=READY, address=f"unix:{path}"))
            answer, _ = router.send(ExpertCall(1, (Part("l/e", "v1", 0, 3),), ROWS))
            refused = await asyncio.wait_for(answer, 20)
            assert isinstance(refused, Unavailable)  # its process lives: no input is charged with a death
            assert "the row counts of a reply must be integers" in refused.message
            assert router.lost == ["i"]

    run_async(main())


REPLICA = """
import sys
from pathlib import Path
from expertmesh.cluster.channel.replica_end import ChannelServer
from expertmesh.experts.host import ExpertHost
host = ExpertHost()
server = ChannelServer(host, "r", sys.argv[1].encode())
server.listen_unix(Path(sys.argv[2]))
print(server.address, host.incarnation, flush=True)
sys.stdin.read()
"""


def test_a_killed_replica_is_noticed_by_its_socket_while_nobody_asks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLICA, SECRET.decode(), str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address, incarnation = process.stdout.readline().split()

        async def main() -> None:
            router = Router(Replica("r", ("l/e",), incarnation, state=READY, address=address))
            with pytest.raises(ExpertMeshError, match="VersionGone"):
                await router.ask(ExpertCall(1, (Part("l/e", "v1", 0, 3),), ROWS))
            os.kill(process.pid, signal.SIGKILL)
            while not router.lost:
                await asyncio.sleep(0.001)
            assert router.lost == [incarnation]
            with pytest.raises(Unavailable, match="no connection"):
                await router.ask(ExpertCall(2, (Part("l/e", "v1", 0, 3),), ROWS))
            router.transport.close()

        run_async(main())


def test_a_connection_that_broke_is_made_again_at_the_next_report(served: Served) -> None:
    async def main() -> None:
        router = Router(served.replica())
        await router.ask(served.call())
        framed = router.transport._channels["r"]._framed
        assert framed is not None
        framed._socket.shutdown(socket.SHUT_RDWR)
        while not router.lost:
            await asyncio.sleep(0.001)
        router.refresh()
        assert torch.equal(await router.ask(served.call(2)), ROWS.sin())
        router.transport.close()

    run_async(main())
