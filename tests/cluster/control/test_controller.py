"""The controller against a router and replicas that can die, lag and forget, with a real registry and no Ray."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from expertmesh.cluster.control.controller import Controller, open_controller
from expertmesh.cluster.control.events import UnloadVersion
from expertmesh.cluster.control.messages import (
    Candidate,
    Change,
    Desired,
    RouterReport,
    RouterUpdate,
    SwapRequest,
    SwapResult,
    proposal_of,
)
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.control.ports import StateSettings
from expertmesh.experts.errors import Aborted, DataLoss, DeadlineExceeded, FailedPrecondition, Fenced, Unavailable
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.spec import Autoscale, Expert, TensorSpec
from expertmesh.experts.staging.stage import Receipt
from expertmesh.experts.weights.files import save_tensors
from expertmesh.router import gates
from expertmesh.router.fanout.replica_view import READY, Replica
from expertmesh.router.fanout.telemetry import ReplicaLoad
from expertmesh.router.mixture.layer import Layer

E0, GATE = "l/e0", "l/gate"


def layer(factory: str = "torch:sin") -> Layer:
    rows = TensorSpec((2,), "float32")
    experts = {"e0": Expert(factory, input=rows), "e1": Expert("torch:cos", input=rows)}
    return Layer("l", gates.Fixed([0.5, 0.5]), experts, input=rows)


class FakeRouter:
    """Adopts what it is told once it has the gates; `restart` forgets everything."""

    def __init__(self) -> None:
        self.restarts = 0
        self.syncs = 0
        self.lost = False
        self.pinned: int | None = None
        self.loads: dict[str, ReplicaLoad] = {}
        self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.revision = self.epoch = 0
        self.gates: set[tuple[str, str]] = set()
        self.update: RouterUpdate | None = None

    async def declare(self, router: str, handle: Any, desired: Desired) -> None:
        self.revision = desired.revision

    async def sync(self, order: Order, router: str, handle: Any, update: RouterUpdate) -> RouterReport:
        if self.lost:
            raise Unavailable("the router is restarting")
        self.syncs += 1
        self.update = update
        wanted = update.epochs.get(update.current, {})
        if self.revision and (GATE, wanted.get(GATE, "")) in self.gates:
            self.epoch = max(self.epoch, update.current)
        return RouterReport(
            incarnation=f"router-{self.restarts}",
            revision=self.revision,
            epoch=self.epoch,
            oldest_pinned=self.epoch if self.pinned is None else self.pinned,
            gates=frozenset(self.gates),
            loads=self.loads,
        )

    async def stage(self, order: Order, router: str, handle: Any, candidate: Candidate) -> Receipt:
        version = candidate.version or f"v{candidate.counter}-{'a' * 12}"
        self.gates.add((candidate.id, version))
        digest = version.partition("-")[2] + "0" * 52
        nothing = TensorSpec()
        return Receipt(candidate.id, version, "router", digest, digest, None, 0, 0.0, nothing, nothing)

    async def unload(self, order: Order, router: str, handle: Any, id: str, version: str) -> None:
        self.gates.discard((id, version))


class FakeReplicas:
    """Real hosts that can be killed; `late` ones never answer a probe, `down` ones are not there.

    A `deadly` factory ends the process of its replica.
    """

    def __init__(self, names: list[str]) -> None:
        self.hosts = {name: ExpertHost() for name in names}
        self.down: set[str] = set()
        self.late: set[str] = set()
        self.hold_back: asyncio.Event | None = None
        self.deadly: set[str | None] = set()
        self.deaths = 0

    def _host(self, name: str) -> ExpertHost:
        if name in self.down:
            raise Unavailable(f"{name} is down")
        return self.hosts[name]

    async def waits_for(self, needs: Mapping[str, float]) -> str:
        return ""

    async def probe(self, order: Order, name: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
        if name in self.late:
            await asyncio.Event().wait()
        host = self._host(name)
        holds = host.holds()
        return Replica(id=name, incarnation=host.incarnation, holds=holds, state=READY)

    async def stage(self, order: Order, name: str, handle: Any, candidate: Candidate) -> Receipt:
        if self.hold_back is not None:
            await self.hold_back.wait()
        if candidate.expert is not None and candidate.expert.factory in self.deadly and name not in self.down:
            self.deaths += 1
            self.down.add(name)
        assert candidate.timeout < math.inf
        return self._host(name).stage(proposal_of(candidate), candidate.replaces)

    async def unload(self, order: Order, name: str, handle: Any, id: str, version: str) -> None:
        self._host(name).unload(id, version)

    def holds(self, name: str) -> set[tuple[str, str]]:
        return set(self.hosts[name].holds())


class World:
    """A controller with its fakes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("expertmesh.cluster.control.controller.TURN_SECONDS", 0.0)
        monkeypatch.setattr("expertmesh.cluster.control.controller.PROBE_TIMEOUT", 0.01)
        self.folder = folder
        self.router = FakeRouter()
        self.replicas = FakeReplicas(["l/e0#0", "l/e0#1", "l/e1#0"])
        self.revision = 0
        self.controller = self.open()

    def open(self) -> Controller:
        settings = StateSettings(state_dir=str(self.folder / "state"), retain_epochs=2)
        return open_controller(settings, self.router, self.replicas)

    async def declare(
        self, declared: Layer, packs: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    ) -> dict[str, str]:
        self.revision += 1
        replicas = {name: packs.get(name, (name.partition("#")[0],)) for name in self.replicas.hosts}
        desired = Desired(revision=self.revision, layers={"l": declared}, replicas=replicas, routers={"router-0": None})
        return await self.controller.declare(desired, 5.0)

    async def until(self, done: Callable[[], object]) -> None:
        for _ in range(500):
            if done():
                return
            await self.controller.turn()
            await asyncio.sleep(0.001)
        raise AssertionError("it did not come to pass")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(folder, monkeypatch)
        try:
            await asyncio.wait_for(story(world), 60)
        finally:
            world.controller.close()

    asyncio.run(main())


def test_declaring_loads_everybody_and_makes_the_first_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        versions = await world.declare(layer())
        assert set(versions) == {E0, "l/e1", GATE}
        assert world.router.epoch == 1
        assert world.replicas.holds("l/e0#0") == world.replicas.holds("l/e0#1") == {(E0, versions[E0])}
        assert await world.declare(layer()) == versions
        assert world.controller.reconciler.current == 1  # nothing was edited, so nothing changed

    run(tmp_path, monkeypatch, story)


def test_an_edited_declaration_becomes_a_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        assert after[E0] != before[E0]
        assert after["l/e1"] == before["l/e1"]
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})

    run(tmp_path, monkeypatch, story)


def test_a_restarted_replica_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        versions = await world.declare(layer())
        world.replicas.down.add("l/e0#0")
        await world.until(lambda: world.controller.state().replicas[0].state == "restarting")
        assert all(holds == frozenset() for holds in [world.controller.state().replicas[0].holds])
        world.replicas.hosts["l/e0#0"] = ExpertHost()
        world.replicas.down.clear()
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, versions[E0])})
        await world.until(
            lambda: world.router.update is not None and (E0, versions[E0]) in world.router.update.replicas[0].holds
        )

    run(tmp_path, monkeypatch, story)


def test_a_late_replica_is_believed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await world.declare(layer())
        world.replicas.late.add("l/e0#1")
        await world.controller.turn()
        assert world.controller.state().replicas[1].state == READY
        await world.until(lambda: world.controller.state().replicas[1].state == "unresponsive")

    run(tmp_path, monkeypatch, story)


def test_a_restarted_router_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await world.declare(layer())
        world.router.restart()
        await world.until(lambda: world.router.epoch == 1)
        assert world.router.revision == world.revision

    run(tmp_path, monkeypatch, story)


def test_a_lost_router_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await world.declare(layer())
        world.router.lost = True
        with pytest.raises(Unavailable):
            await world.controller.turn()
        world.router.lost = False
        await world.controller.turn()

    run(tmp_path, monkeypatch, story)


def test_a_refused_replacement_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        with pytest.raises(FailedPrecondition):
            await world.declare(layer("torch:logical_not"))  # answers with booleans where rows were float
        assert world.controller.reconciler.current == 1
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, before[E0])})

    run(tmp_path, monkeypatch, story)


def test_a_candidate_that_ends_its_replicas_is_given_up_after_the_first_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        world.replicas.deadly = {"torch:tanh"}
        with pytest.raises(FailedPrecondition, match=r"^l/e0: the process of l/e0#\d ended while it built the new"):
            await world.declare(layer("torch:tanh"))
        assert world.replicas.deaths == 1  # the other replica serves on
        assert world.controller.reconciler.current == 1
        for name in list(world.replicas.down):
            world.replicas.hosts[name] = ExpertHost()
        world.replicas.down.clear()
        for name in ("l/e0#0", "l/e0#1"):
            await world.until(lambda name=name: world.replicas.holds(name) == {(E0, before[E0])})  # type: ignore[misc]
        assert world.replicas.deaths == 1

    run(tmp_path, monkeypatch, story)


def test_a_version_that_ends_every_process_that_loads_it_leaves_the_rest_of_its_pack_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.cluster.control.replica_health.FIRST_REST", 1e6)
    monkeypatch.setattr("expertmesh.cluster.control.replica_health.LONGEST_REST", 1e6)

    async def story(world: World) -> None:
        pack = {"l/p#0": (E0, "l/e1")}
        world.replicas.hosts = {"l/p#0": ExpertHost()}
        versions = await world.declare(layer(), pack)
        world.replicas.deadly = {"torch:sin"}
        world.replicas.hosts["l/p#0"] = ExpertHost()

        def restarted() -> bool:
            for name in world.replicas.down:
                world.replicas.hosts[name] = ExpertHost()
            world.replicas.down.clear()
            return world.replicas.holds("l/p#0") == {("l/e1", versions["l/e1"])}

        await world.until(restarted)
        for _ in range(20):
            await world.controller.turn()
            await asyncio.sleep(0)
            assert restarted()
        assert world.replicas.deaths == 2
        broken = world.controller.state().broken
        assert list(broken) == [E0]
        assert broken[E0].startswith(f"{E0} {versions[E0]}: 2 processes of l/p#0 ended while they loaded it")
        assert world.router.update is not None
        assert world.router.update.broken == broken
        after = await world.declare(layer("torch:tanh"), pack)
        assert world.replicas.holds("l/p#0") == {(id, after[id]) for id in (E0, "l/e1")}
        assert world.controller.state().broken == {}

    run(tmp_path, monkeypatch, story)


def test_a_version_that_ended_processes_is_tried_again_after_a_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.cluster.control.replica_health.FIRST_REST", 0.0)

    async def story(world: World) -> None:
        versions = await world.declare(layer())
        world.replicas.deadly = {"torch:sin"}
        world.replicas.down.add("l/e0#0")

        def restarted() -> None:
            for name in world.replicas.down:
                world.replicas.hosts[name] = ExpertHost()
            world.replicas.down.clear()

        await world.until(lambda: restarted() or E0 in world.controller.state().broken)
        world.replicas.deadly = set()
        await world.until(lambda: restarted() or not world.controller.state().broken)
        assert world.replicas.holds("l/e0#0") == {(E0, versions[E0])}

    run(tmp_path, monkeypatch, story)


def test_a_replica_that_was_dead_already_is_not_held_against_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        world.replicas.down.add("l/e0#0")  # nobody has noticed
        after = await world.declare(layer("torch:tanh"))
        assert after[E0] != before[E0]

    run(tmp_path, monkeypatch, story)


def test_another_controller_takes_over_and_the_first_is_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        versions = await world.declare(layer())
        first = world.controller
        world.controller = world.open()
        assert await world.declare(layer()) == versions
        request = SwapRequest(swap_id="late", changes={E0: Change(version=versions[E0])}, timeout=1.0)
        with pytest.raises(Aborted):
            await first.swap(request)
        first.close()

    run(tmp_path, monkeypatch, story)


def test_old_versions_stay_loaded_while_they_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        world.router.pinned = 1
        after = await world.declare(layer("torch:tanh"))
        for _ in range(5):
            await world.controller.turn()
            await asyncio.sleep(0)
        assert world.replicas.holds("l/e0#0") == {(E0, before[E0]), (E0, after[E0])}
        world.router.pinned = None
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})

    run(tmp_path, monkeypatch, story)


def test_a_rollback_brings_the_former_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})
        request = SwapRequest(
            swap_id="back", changes={E0: Change(version=before[E0])}, expect={E0: after[E0]}, timeout=2.0
        )
        waiting = asyncio.ensure_future(world.controller.swap(request))
        await world.until(waiting.done)
        result = waiting.result()
        assert result.after == {E0: before[E0]}
        assert result.epoch == 3
        assert [entry["version"] for entry in world.controller.history(E0)] == [before[E0], after[E0]]
        again = await world.controller.swap(request)
        assert (again.epoch, again.after) == (result.epoch, result.after)

    run(tmp_path, monkeypatch, story)


def test_two_swaps_of_one_expert_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})
        world.replicas.hold_back = asyncio.Event()
        change = {E0: Change(version=before[E0])}
        first = asyncio.ensure_future(world.controller.swap(SwapRequest(swap_id="1", changes=change, timeout=2.0)))
        await world.until(lambda: world.controller.reconciler.swaps.find("1") is not None)
        with pytest.raises(Aborted, match="under way"):
            await world.controller.swap(SwapRequest(swap_id="2", changes=change, timeout=2.0))
        world.replicas.hold_back.set()
        world.replicas.hold_back = None
        await world.until(first.done)
        assert first.result().committed
        stale = SwapRequest(swap_id="3", changes=change, expect={E0: after[E0]}, timeout=2.0)
        with pytest.raises(Aborted, match="as expected"):
            await world.controller.swap(stale)

    run(tmp_path, monkeypatch, story)


def test_a_swap_is_committed_only_over_what_it_was_prepared_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})
        transactions, change = world.controller.transactions, {E0: Change(version=before[E0])}
        transactions.prepare(SwapRequest(swap_id="late", changes=change, timeout=5.0))
        quick = await swapped(world, SwapRequest(swap_id="quick", changes=change, timeout=5.0))
        with pytest.raises(Aborted, match=f"{E0}: expected {after[E0]}, found {before[E0]}"):
            transactions.commit("late", {E0: before[E0]})
        assert transactions.registry.current().number == quick.epoch  # type: ignore[union-attr]

    run(tmp_path, monkeypatch, story)


def test_turns_follow_in_quick_succession_only_while_a_swap_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})
        monkeypatch.setattr("expertmesh.cluster.control.controller.TURN_SECONDS", 60.0)
        monkeypatch.setattr("expertmesh.cluster.control.controller.DRAIN_SECONDS", 0.0)
        told = world.router.syncs
        turns = asyncio.ensure_future(world.controller.run())
        while world.router.syncs == told:
            await asyncio.sleep(0.001)
        held = world.replicas.hold_back = asyncio.Event()
        request = SwapRequest(swap_id="1", changes={E0: Change(version=before[E0])}, timeout=30.0)
        swap = asyncio.ensure_future(world.controller.swap(request))
        while world.controller.reconciler.swaps.find("1") is None:
            await asyncio.sleep(0.001)
        told = world.router.syncs
        for _ in range(50):
            await asyncio.sleep(0)
        assert world.router.syncs == told  # it only stages
        world.router.pinned = world.router.epoch
        held.set()
        assert (await swap).committed
        while world.router.syncs < told + 5:  # whoever pins the older epoch is looked after
            await asyncio.sleep(0)
        assert world.controller.reconciler.swaps.draining()
        world.router.pinned = None
        while world.controller.reconciler.swaps.draining():
            await asyncio.sleep(0)
        turns.cancel()

    run(tmp_path, monkeypatch, story)


def test_a_new_controller_unloads_nothing_before_the_router_has_told_its_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        world.router.pinned = 1
        after = await world.declare(layer("torch:tanh"))
        world.controller.close()
        world.controller = world.open()
        unloaded: list[str] = []
        unload = world.replicas.unload

        async def noted(order: Order, name: str, handle: Any, id: str, version: str) -> None:
            unloaded.append(version)
            await unload(order, name, handle, id, version)

        monkeypatch.setattr(world.replicas, "unload", noted)
        assert await world.declare(layer("torch:tanh")) == after
        for _ in range(5):
            await world.controller.turn()
            await asyncio.sleep(0)
        assert unloaded == []
        assert world.replicas.holds("l/e0#0") == {(E0, before[E0]), (E0, after[E0])}
        world.router.pinned = None
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})

    run(tmp_path, monkeypatch, story)


def test_a_new_controller_asks_for_patience_until_it_is_told_what_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        versions = await world.declare(layer())
        world.controller.close()
        world.controller = world.open()
        with pytest.raises(Unavailable):  # not NotFound: the client asks again
            await world.controller.swap(SwapRequest(swap_id="1", changes={E0: Change(version=versions[E0])}))
        with pytest.raises(Unavailable):
            world.controller.history(E0)
        with pytest.raises(Unavailable):
            await world.controller.declared()
        await world.declare(layer())
        assert [entry["version"] for entry in world.controller.history(E0)] == [versions[E0]]

    run(tmp_path, monkeypatch, story)


def test_what_is_declared_is_told_with_the_replicas_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        await world.declare(layer())
        declared = await world.controller.declared()
        assert declared["layers"]["l"]["experts"] == ["e0", "e1"]
        assert declared["replicas"] == {E0: 2, "l/e1": 1}
        assert declared["experts"][E0]["digest"] == world.controller.transactions.builder.digests[E0]

    run(tmp_path, monkeypatch, story)


def test_what_a_swap_has_adopted_is_what_is_declared_also_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        first = await world.declare(layer())
        declared = await world.controller.declared()
        swap = SwapRequest(swap_id="1", changes={E0: Change(expert=Expert("torch:cos"))}, adopts={E0: "ab" * 32})
        await world.controller.swap(swap)
        adopted = await world.controller.declared()
        assert {**adopted["experts"][E0], "code": ""} == {
            **declared["experts"][E0], "factory": "torch:cos", "digest": "ab" * 32, "code": "",
        }  # fmt: skip
        assert adopted["experts"]["l/e1"] == declared["experts"]["l/e1"]
        world.controller.close()
        world.controller = world.open()
        versions = await world.declare(layer())  # by an owner that knows nothing of the swap
        assert versions[E0] != first[E0]
        assert await world.controller.declared() == adopted
        back = SwapRequest(
            swap_id="2", changes={E0: Change(version=first[E0])}, adopts={E0: declared["experts"][E0]["digest"]}
        )
        await world.controller.swap(back)
        assert await world.controller.declared() == declared

    run(tmp_path, monkeypatch, story)


def test_the_load_asks_for_replicas_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("expertmesh.cluster.placement.autoscale_turns.TICK_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "expertmesh.cluster.control.controller")

    async def story(world: World) -> None:
        rule = Autoscale(max=4, up_after=0.001, down_after=1000)
        plain = layer()
        scaled = {name: replace(expert, replicas=2, autoscale=rule) for name, expert in plain.experts.items()}
        await world.declare(plain.with_experts({**plain.experts, "e0": scaled["e0"]}))
        assert world.controller.state().asked == {}

        def asked() -> bool:
            old = world.router.loads.get("l/e0#0", ReplicaLoad())
            more = ReplicaLoad(rows=old.rows + 10, waited=old.waited + 100.0)
            world.router.loads = {"l/e0#0": more, "l/e1#0": more}
            return bool(world.controller.state().asked)

        await world.until(asked)
        ((group, (decision, number)),) = world.controller.state().asked.items()
        assert (group, number) == (E0, 4)
        assert decision.startswith(world.controller.incarnation)
        assert "autoscale: l/e0 from 2 to 4 replicas: for " in caplog.text
        update = world.router.update
        await world.until(lambda: world.router.update is not update)
        assert world.router.update is not None
        assert world.router.update.scaled[E0].up >= 1
        assert "rows have waited more than 50 ms" in world.router.update.scaled[E0].reason

    run(tmp_path, monkeypatch, story)


def test_a_replica_that_staged_other_tensors_than_were_sent_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the transport takes the file of one expert for that of another: their shapes are the same."""

    async def story(world: World) -> None:
        rows = TensorSpec((2,), "float32")
        linear = {name: Expert("torch.nn:Linear", args=(2, 2), input=rows) for name in ("e0", "e1")}
        await world.declare(Layer("l", gates.Fixed([0.5, 0.5]), linear, input=rows))
        sent: dict[str, Path] = {}
        for number, upload in enumerate(("right", "wrong")):
            sent[upload] = world.controller.transactions.store.upload_path(upload)
            save_tensors(sent[upload], {"weight": torch.full((2, 2), 2.0 + number), "bias": torch.ones(2)})

        async def stage(order: Order, name: str, handle: Any, candidate: Candidate) -> Receipt:
            proposal = replace(proposal_of(candidate), weights=sent[arrives])
            return world.replicas.hosts[name].stage(proposal, candidate.replaces)

        monkeypatch.setattr(world.replicas, "stage", stage)
        request = SwapRequest(swap_id="1", changes={E0: Change(upload="right")}, timeout=5.0)
        arrives = "wrong"
        with pytest.raises(DataLoss, match="other tensors"):
            await world.controller.swap(request)
        assert world.controller.reconciler.current == 1
        arrives = "right"
        waiting = asyncio.ensure_future(world.controller.swap(replace(request, swap_id="2")))
        await world.until(waiting.done)
        assert waiting.result().committed

    run(tmp_path, monkeypatch, story)


def test_a_note_is_for_people_and_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        before = await world.declare(layer())
        await world.declare(layer("torch:tanh"))
        transactions, edited = world.controller.transactions, "e" * 64
        transactions.builder.digests[E0] = edited
        change = {E0: Change(version=before[E0])}
        request = SwapRequest(swap_id="1", changes=change, timeout=5.0, note="declared")
        waiting = asyncio.ensure_future(world.controller.swap(request))
        await world.until(waiting.done)
        assert transactions.registry.declared(E0) != edited
        waiting = asyncio.ensure_future(world.controller.swap(replace(request, swap_id="2", declares=True, note="")))
        await world.until(waiting.done)
        assert transactions.registry.declared(E0) == edited

    run(tmp_path, monkeypatch, story)


def test_a_journal_whose_plans_are_notes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was written until swaps had typed fields."""

    async def story(world: World) -> None:
        versions = await world.declare(layer())
        registry = world.controller.transactions.registry
        registry.begin_swap("done", {E0: f"rollback {versions[E0]}"})
        registry.commit("done", {E0: versions[E0]}, expect={})
        registry.begin_swap("open", {E0: "upload", GATE: "declared"})
        world.controller.close()
        world.controller = world.open()
        assert await world.declare(layer()) == versions
        change = {E0: Change(version=versions[E0])}
        result = await world.controller.swap(SwapRequest(swap_id="done", changes=change))
        assert (result.epoch, result.after) == (2, {E0: versions[E0]})
        with pytest.raises(Aborted, match="restarted before the commit"):
            await world.controller.swap(SwapRequest(swap_id="open", changes=change))

    run(tmp_path, monkeypatch, story)


async def swapped(world: World, request: SwapRequest) -> SwapResult:
    waiting = asyncio.ensure_future(world.controller.swap(request))
    await world.until(waiting.done)
    return waiting.result()


def test_a_controller_that_was_replaced_takes_no_more_turns_and_unloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of what its successor loads, and would unload it."""

    async def story(world: World) -> None:
        await world.declare(layer())
        first = world.controller
        turns = asyncio.ensure_future(first.run())
        world.controller = world.open()
        after = await world.declare(layer("torch:tanh"))
        await asyncio.wait_for(turns, 5.0)
        with pytest.raises(Fenced):
            await first.turn()
        unloaded: list[tuple[int, str]] = []  # its successor may unload the earlier version meanwhile

        async def noted(order: Order, name: str, handle: Any, id: str, version: str) -> None:
            unloaded.append((order.term, version))

        monkeypatch.setattr(world.replicas, "unload", noted)
        await first.executor.perform([UnloadVersion("l/e0#0", "", E0, after[E0])])
        await asyncio.gather(*first.executor._tasks)
        assert [version for term, version in unloaded if term == first.transactions.term] == []
        first.close()

    run(tmp_path, monkeypatch, story)


def test_a_disk_that_does_not_say_whether_it_has_committed_is_asked_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the candidates would be unloaded, and be those of the current epoch."""

    async def story(world: World) -> None:
        monkeypatch.setattr("expertmesh.cluster.control.executor.COMMIT_SECONDS", 0.0)
        before = await world.declare(layer())
        await swapped(world, SwapRequest(swap_id="1", changes={E0: Change(version=before[E0])}, timeout=5.0))
        registry, asked = world.controller.transactions.registry, []
        commit = registry.commit

        def late(swap_id: str, *given: Any, **more: Any) -> Any:
            epoch = commit(swap_id, *given, **more)
            asked.append(swap_id)
            if len(asked) < 4:
                raise Unavailable("the disk has done it, but did not say so in time")
            return epoch

        monkeypatch.setattr(registry, "commit", late)
        result = await swapped(world, SwapRequest(swap_id="2", changes={E0: Change(version=before[E0])}, timeout=5.0))
        assert (result.epoch, asked) == (3, ["2"] * 4)
        assert world.controller.reconciler.current == 3

    run(tmp_path, monkeypatch, story)


def test_a_death_right_after_the_commit_of_a_declaration_does_not_bring_it_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was swapped in since would be undone by the next start."""

    async def story(world: World) -> None:
        transactions = world.controller.transactions
        commit = transactions.commit

        def dies(swap_id: str, versions: Mapping[str, str]) -> Any:
            commit(swap_id, versions)
            raise Fenced("as good as dead")

        monkeypatch.setattr(transactions, "commit", dies)
        with pytest.raises(Unavailable):
            await world.declare(layer())
        world.controller.close()
        world.controller = world.open()
        await world.declare(layer())
        assert world.controller.reconciler.current == 1

    run(tmp_path, monkeypatch, story)


def test_a_swap_that_was_committed_long_ago_is_still_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its epoch is not kept any more."""

    async def story(world: World) -> None:
        version = (await world.declare(layer()))[E0]
        requests = [SwapRequest(swap_id=str(n), changes={E0: Change(version=version)}, timeout=5.0) for n in range(5)]
        first = await swapped(world, requests[0])
        for request in requests[1:]:
            await world.until(lambda: not world.controller.reconciler.swaps.active())
            await swapped(world, request)
        await world.until(lambda: first.epoch not in world.controller.transactions.epochs())
        again = await world.controller.swap(requests[0])
        assert again == replace(first, drift=again.drift, unmeasured=again.unmeasured)
        assert again.after == {E0: version}

    run(tmp_path, monkeypatch, story)


def test_a_candidate_whose_swap_has_ended_is_not_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        version = (await world.declare(layer()))[E0]
        staged: list[int] = []
        stage = world.replicas.stage

        async def counted(order: Order, name: str, handle: Any, candidate: Candidate) -> Receipt:
            staged.append(candidate.counter)
            return await stage(order, name, handle, candidate)

        monkeypatch.setattr(world.replicas, "stage", counted)
        held = world.replicas.hold_back = asyncio.Event()
        for swap_id in ("1", "2"):  # the second waits for its turn behind the first
            with pytest.raises(DeadlineExceeded):
                await swapped(world, SwapRequest(swap_id=swap_id, changes={E0: Change(version=version)}, timeout=0.1))
        held.set()
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert len(staged) == 2  # by either replica of the expert, for the first swap
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    run(tmp_path, monkeypatch, story)


def test_a_report_that_is_older_than_a_receipt_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a replica would be said not to hold what it has just staged, or still to hold what it has just unloaded."""

    async def story(world: World) -> None:
        before = await world.declare(layer())
        after = await world.declare(layer("torch:tanh"))
        await world.until(lambda: world.replicas.holds("l/e0#0") == {(E0, after[E0])})
        monkeypatch.setattr("expertmesh.cluster.control.controller.PROBE_TIMEOUT", 30.0)
        probe, taken, arrives = world.replicas.probe, asyncio.Event(), asyncio.Event()

        async def late(order: Order, name: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
            first, report = not taken.is_set(), await probe(order, name, handle, given_up)
            taken.set()
            if first:  # the later ones are of the staging
                await arrives.wait()
            return report

        async def of_late_report(done: Callable[[], object]) -> frozenset[tuple[str, str]]:
            """What is known of the replica after a report that was taken before `done` and came after it."""
            taken.clear(), arrives.clear()
            asked = asyncio.ensure_future(world.controller._probe("l/e0#0", None))
            await taken.wait()
            while not done():
                await asyncio.sleep(0.001)
            arrives.set()
            await asked
            return world.controller.state().replicas[0].holds

        monkeypatch.setattr(world.replicas, "probe", late)
        world.router.pinned = 2
        request = SwapRequest(swap_id="1", changes={E0: Change(version=before[E0])}, timeout=30.0)
        swap = asyncio.ensure_future(world.controller.swap(request))
        assert await of_late_report(swap.done) == {(E0, before[E0]), (E0, after[E0])}
        world.router.pinned = None
        await world.controller._sync()  # after any that told of the pin
        assert await of_late_report(lambda: len(world.replicas.holds("l/e0#0")) == 1) == {(E0, before[E0])}

    run(tmp_path, monkeypatch, story)
