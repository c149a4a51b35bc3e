"""Clients: requests, leases, swaps of one id or of sets, rollbacks, races, repeated questions; and chance disasters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sim.calls import Request
from sim.network import Process
from sim.router import GATE, Router

if TYPE_CHECKING:
    from sim.world import World

ATTEMPT_SECONDS = 3.0
ATTEMPTS = 5
LATE = 16.0
"""From here on a lease may last to the end."""


class Clients:
    """All that is asked of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: dict[str, dict[str, str]] = {}
        self.calm = False
        self._process = Process("client", "client")
        self._requests = 0
        self._swaps = 0
        self._leases = 0

    def begin(self) -> None:
        """Start asking, once the cluster has had time to start."""
        clock = self.world.clock
        clock.after(5.0, self._keep_asking)
        clock.after(5.5, self._keep_leasing)
        clock.after(clock.between(5.0, 7.0), self._keep_swapping)
        if self.world.stormy:
            clock.after(clock.between(6.0, 10.0), self._keep_spoiling)

    # ---- requests

    def _keep_asking(self) -> None:
        clock = self.world.clock
        if self.calm:
            return
        self._ask(clock.rng.choice(self.world.routers()))
        clock.after(clock.between(0.1, 0.6), self._keep_asking)

    def _ask(self, router: Router, lease: int = 0) -> None:
        if router.alive:
            self._requests += 1
            Request(router, self._requests, self.world.clock.rng.randint(1, 3), self.world.ended, lease).start()

    def _keep_leasing(self) -> None:
        """Pin an epoch at a router over several calls, now and then to the very end."""
        clock = self.world.clock
        if self.calm:
            return
        router = clock.rng.choice(self.world.routers())
        if router.serves:
            self._leases += 1
            number = self._leases
            router.lease(number)
            for n in range(clock.rng.randint(1, 6)):
                clock.after(n * 0.7, self._use, router, number)
            if clock.now < LATE or clock.chance(0.5):
                clock.after(clock.between(1.0, 4.5), router.end_lease, number)
        clock.after(clock.between(1.5, 4.0), self._keep_leasing)

    def _use(self, router: Router, number: int) -> None:
        if router.serves and number in router.leases:
            self._ask(router, number)

    def close_leases(self) -> None:
        """What is still leased must answer, with all experts; then the leases end."""
        for router in self.world.routers():
            for number in list(router.leases):
                for _ in range(3):
                    self._ask(router, number)
                self.world.clock.after(3.0, router.end_lease, number)

    # ---- swaps

    def _keep_swapping(self) -> None:
        clock = self.world.clock
        if self.calm:
            return
        self._swap()
        clock.after(clock.between(0.2, 2.2), self._keep_swapping)

    def _swap(self) -> None:
        world, rng = self.world, self.world.clock.rng
        ids = rng.sample(world.experts, rng.choice((1, 1, 2, 3)))
        if world.clock.chance(0.3):
            ids.append(GATE)
        self._swaps += 1
        current = world.registry.epochs[world.registry.current]
        rollback = world.clock.chance(0.25)
        swap_id = f"{'rollback' if rollback else 'swap'}-{self._swaps}"
        versions = {id: self._version(id, rollback) for id in ids}
        expect: dict[str, str] = {}
        if world.clock.chance(0.4):
            expect = {id: current[id] if world.clock.chance(0.8) else "v0-0" for id in ids}
        self.asked[swap_id] = versions
        world.open_swaps.add(swap_id)
        self._attempt(swap_id, expect, 1)

    def _version(self, id: str, rollback: bool) -> str:
        """A new version, or one that an epoch of the registry still names."""
        history, rng = self.world.registry.history, self.world.clock.rng
        if rollback:
            return rng.choice([versions[id] for versions in self.world.registry.epochs.values()])
        newest = max(int(versions[id][1:].partition("-")[0]) for versions in history.values())
        return f"v{newest + 1}-{rng.randint(0, 1)}"

    def _attempt(self, swap_id: str, expect: dict[str, str], attempt: int) -> None:
        deadline = self.world.clock.now + ATTEMPT_SECONDS
        told = (deadline, swap_id, self.asked[swap_id], expect)
        done = partial(self._told, swap_id, expect, attempt, deadline)
        self.world.network.call(self._process, "controller", "swap", told, done, ATTEMPT_SECONDS)

    def _told(self, swap_id: str, expect: dict[str, str], attempt: int, deadline: float, result: Any) -> None:
        """Where no answer came, ask again under the same id, once the former question cannot be taken up any more."""
        world = self.world
        if result is None and attempt < ATTEMPTS:
            world.clock.after(deadline - world.clock.now + 0.001, self._attempt, swap_id, expect, attempt + 1)
            return
        world.open_swaps.discard(swap_id)
        if result is None:
            world.checker.counts["gave up"] += 1
            return
        epoch, error = result
        world.checker.answered(swap_id, self.asked[swap_id], epoch, error)
        if epoch is not None and world.clock.chance(0.1):
            world.open_swaps.add(swap_id)
            self._attempt(swap_id, expect, ATTEMPTS)

    # ---- disasters

    def _keep_spoiling(self) -> None:
        """Now and then something that no step of a swap brings about."""
        world, clock = self.world, self.world.clock
        if self.calm:
            return
        happening = clock.rng.choice(("crash", "crash", "cut off", "replace", "nothing"))
        victims = [found for found in world.network.processes.values() if found.alive]
        if happening == "crash":
            world.crash(clock.rng.choice(victims))
        elif happening == "cut off":
            victim = clock.rng.choice([found for found in victims if found.name != "controller"])
            victim.cut_off = True
            clock.after(clock.between(1.0, 12.0), setattr, victim, "cut_off", False)
        elif happening == "replace":
            world.replace_controller()
        clock.after(clock.between(2.0, 6.0), self._keep_spoiling)
