"""Clients: requests, leases, swaps of one id or of sets, rollbacks, races, repeated questions; and chance disasters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sim.calls import Request
from sim.network import Process
from sim.replica import digest_of, digits
from sim.router import GATE, Router

from expertmesh.cluster.control.messages import Change, SwapRequest, SwapResult
from expertmesh.experts.errors import Aborted, ExpertMeshError, Unavailable

if TYPE_CHECKING:
    from sim.world import World

ATTEMPT_SECONDS = 3.0
ATTEMPTS = 5
STAGING_LIMIT = 7.0
INSISTS = 8
RECALL_SECONDS = 2.5
LATE = 16.0
"""From here on a lease may last to the end."""


class Clients:
    """All that is asked of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: dict[str, dict[str, str]] = {}
        """How the versions of each swap must end: in digits of what was uploaded, or as the version to go back to."""
        self.calm = False
        self._insists: dict[str, int] = {}
        self._process = Process("client", "client")
        self._requests = 0
        self._swaps = 0
        self._leases = 0

    def begin(self) -> None:
        """Start asking."""
        clock = self.world.clock
        clock.after(0.5, self._keep_asking)
        clock.after(1.0, self._keep_leasing)
        if self.world.recalls:
            clock.after(clock.between(1.5, 4.0), self._keep_recalling)
        clock.after(clock.between(0.5, 2.5), self._keep_swapping)
        if self.world.stormy:
            clock.after(clock.between(1.5, 5.5), self._keep_spoiling)

    # ---- requests

    def _keep_asking(self) -> None:
        clock = self.world.clock
        if self.calm:
            return
        self._ask(self.world.router())
        clock.after(clock.between(0.1, 0.6), self._keep_asking)

    def _ask(self, router: Router, lease: int = 0, old: int = 0) -> None:
        if router.alive and router.frozen is None:
            self._requests += 1
            Request(router, self._requests, self.world.clock.rng.randint(1, 3), self.world.ended, lease, old).start()

    def _keep_recalling(self) -> None:
        """Ask for an epoch by its number, several times: mostly one before the current one, which is not loaded."""
        clock, disk = self.world.clock, self.world.disk
        if self.calm:
            return
        number = max(1, clock.rng.choice((disk.current - 1, disk.current - 1, disk.current - 2, disk.current)))
        for _ in range(clock.rng.randint(2, 6)):
            clock.after(clock.between(0.0, 8.0), self._by_number, number)
        clock.after(clock.between(0.5, 3.0), self._keep_recalling)

    def _by_number(self, number: int) -> None:
        """As `Pinning` does it: recall the epoch unless the router knows it."""
        world, router = self.world, self.world.router()
        if router.serves and router.epochs.knows(number):
            self._ask(router, old=number)
        elif router.serves:
            done = partial(self._recalled, router, number)
            world.network.call(router, "controller", "recall", (number, RECALL_SECONDS), done, RECALL_SECONDS + 1.0)

    def _recalled(self, router: Router, number: int, result: Any) -> None:
        self.world.checker.counts[f"recall: {result if isinstance(result, str) else type(result).__name__}"] += 1
        if result == "recalled" and router.serves:
            self.world.checker.recalled(router, number)
            if router.epochs.knows(number):
                self._ask(router, old=number)

    def _keep_leasing(self) -> None:
        """Pin an epoch at a router over several calls, now and then to the very end."""
        clock = self.world.clock
        if self.calm:
            return
        router = self.world.router()
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
        current = world.disk.history[world.disk.current]
        expect: dict[str, str] = {}
        if world.clock.chance(0.4):
            expect = {id: current[id] if world.clock.chance(0.8) else "v0-000000000000" for id in ids}
        if world.clock.chance(0.25):
            kept = list(world.disk.epochs.values())
            self._roll_back({id: rng.choice(kept)[id] for id in ids}, expect, 0)
        else:
            self._upload(ids, expect)
            if world.clock.chance(0.4):  # another client has the same idea
                world.clock.after(world.clock.between(0.0, 1.5), self._upload, ids, {})

    def _upload(self, ids: list[str], expect: Mapping[str, str]) -> None:
        if not self.calm:
            self._begin("swap", {id: Change(upload=f"upload-{self._swaps}-{id[2:]}") for id in ids}, expect)

    def _roll_back(self, versions: Mapping[str, str], expect: Mapping[str, str], insists: int) -> None:
        """Go back to these versions. Whoever insists tries so many times more, while what was before still drains."""
        if not self.calm:
            swap_id = self._begin("rollback", {id: Change(version=version) for id, version in versions.items()}, expect)
            self._insists[swap_id] = insists

    def _begin(self, kind: str, changes: Mapping[str, Change], expect: Mapping[str, str]) -> str:
        self._swaps += 1
        swap_id = f"{kind}-{self._swaps}"
        self.asked[swap_id] = {id: _ending(id, change) for id, change in changes.items()}
        self.world.open_swaps.add(swap_id)
        self._attempt(SwapRequest(swap_id=swap_id, changes=changes, expect=expect, timeout=STAGING_LIMIT), 1)
        return swap_id

    def declared_id(self) -> str:
        """The id of a swap that nobody here asks for: it brings what the owner declares."""
        self._swaps += 1
        return f"declare-{self._swaps}"

    def _attempt(self, request: SwapRequest, attempt: int) -> None:
        deadline = self.world.clock.now + ATTEMPT_SECONDS
        done = partial(self._told, request, attempt, deadline)
        self.world.network.call(self._process, "controller", "swap", (deadline, request), done, ATTEMPT_SECONDS)

    def _told(self, request: SwapRequest, attempt: int, deadline: float, result: Any) -> None:
        """Where no answer came, or none that is final, ask again under the same id, once the former question cannot be
        taken up any more."""
        world = self.world
        if isinstance(result, Unavailable):
            world.checker.counts["told to ask again"] += 1
            result = None
        if result is None and attempt < ATTEMPTS:
            world.clock.after(deadline - world.clock.now + 0.001, self._attempt, request, attempt + 1)
            return
        world.open_swaps.discard(request.swap_id)
        if result is None:
            world.checker.counts["gave up"] += 1
            return
        world.checker.answered(request.swap_id, self.asked[request.swap_id], result)
        if not isinstance(result, SwapResult):
            self._insist(request, result)
            return
        if world.clock.chance(0.1):
            world.open_swaps.add(request.swap_id)
            self._attempt(request, ATTEMPTS)
        if result.before and world.clock.chance(0.3):  # it was a mistake
            self._roll_back(result.before, result.after, INSISTS)

    def _insist(self, request: SwapRequest, error: ExpertMeshError) -> None:
        left = self._insists.get(request.swap_id, 0)
        if left and isinstance(error, Aborted):
            versions = {id: change.version for id, change in request.changes.items()}
            self.world.clock.after(0.2, self._roll_back, versions, request.expect, left - 1)

    # ---- disasters

    def _keep_spoiling(self) -> None:
        """Now and then something that no step of a swap brings about."""
        world, clock = self.world, self.world.clock
        if self.calm:
            return
        happening = clock.rng.choice(("crash", "crash", "cut off", "freeze", "freeze", "replace", "nothing"))
        victims = [found for found in world.network.processes.values() if found.alive]
        if happening == "crash":
            world.crash(clock.rng.choice(victims))
        elif happening == "cut off":
            routers = [found for found in victims if isinstance(found, Router)]
            others = [found for found in victims if found.name != "controller"]
            victim = clock.rng.choice(routers if routers and clock.chance(0.5) else others)
            victim.cut_off = True
            clock.after(clock.between(1.0, 12.0), setattr, victim, "cut_off", False)
        elif happening == "freeze":
            world.freeze(clock.rng.choice(victims))
        elif happening == "replace":
            world.replace_controller()
        clock.after(clock.between(2.0, 6.0), self._keep_spoiling)


def _ending(id: str, change: Change) -> str:
    return change.version or f"-{digest_of(id, digits(change.upload or ''))[:12]}"
