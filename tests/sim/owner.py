"""The owner: declares the layer to every controller that does not know it yet, and edits it, as `Cluster` does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from sim.network import Process
from sim.replica import declared_tensors, digest_of
from sim.router import GATE, LAYER

from expertmesh.cluster.control.messages import Desired
from expertmesh.cluster.control.ports import ControllerState
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

if TYPE_CHECKING:
    from sim.world import World

SUPERVISE_SECONDS = 0.5
START_TIMEOUT = 6.0
Edits = tuple[int, ...]
"""How often each expert was edited."""


class Owner(Process):
    """Never dies: its death would be everybody's."""

    def __init__(self, world: World) -> None:
        super().__init__("owner", "owner")
        self.world = world
        self.settled = False
        self._edits: Edits = (0,) * len(world.experts)
        self._before = self._edits
        self._declaring = False
        self.desired = Desired(
            revision=1,
            layers={"l": layer(self._edits)},
            replicas=world.hosts,
            routers=dict.fromkeys(world.router_names),
        )

    def asked(self) -> dict[str, str]:
        """How the versions end that are declared now and were not committed as declared before."""
        tensors = {id: declared_tensors(count) for id, count in zip(self.world.experts, self._edits, strict=True)}
        others = dict.fromkeys((GATE, LAYER), declared_tensors(0))
        endings = {id: f"-{digest_of(id, text)[:12]}" for id, text in {**tensors, **others}.items()}
        return {id: ending for id, ending in endings.items() if self.world.disk.declared.get(id) != ending}

    def supervise(self) -> None:
        """Look whether the controller is up to date, from time to time."""
        self.world.network.call(self, "controller", "state", (), self._heard, SUPERVISE_SECONDS)
        self.world.clock.after(SUPERVISE_SECONDS, self.supervise)

    def keep_editing(self) -> None:
        """Now and then edit an expert: a failure takes the edit back, and declares that."""
        clock = self.world.clock
        if self.world.clients.calm:
            return
        if self.settled and not self._declaring:
            edited = clock.rng.randrange(len(self._edits))
            self._before = self._edits
            self._desire(tuple(count + (n == edited) for n, count in enumerate(self._edits)))
        clock.after(clock.between(4.0, 12.0), self.keep_editing)

    def _desire(self, edits: Edits) -> None:
        pairs = zip(self.world.experts, self._edits, edits, strict=True)
        edited = frozenset(id for id, old, new in pairs if old != new)
        redeclare = edited if self.settled else edited | self.desired.redeclare
        self._edits, self.settled = edits, False
        revision = self.desired.revision + 1
        declared = replace(self.desired, revision=revision, declaration=revision)
        self.desired = replace(declared, layers={"l": layer(edits)}, redeclare=redeclare)
        self._declare()

    def _heard(self, state: ControllerState | None) -> None:
        if state is not None and state.revision < self.desired.revision and not self._declaring:
            self._declare()

    def _declare(self) -> None:
        self._declaring = True
        arguments = (self.desired, START_TIMEOUT)
        self.world.network.call(self, "controller", "declare", arguments, self._declared, START_TIMEOUT + 0.5)

    def _declared(self, result: Any) -> None:
        self._declaring = False
        if isinstance(result, dict):
            self.settled = True
            self.world.checker.counts["declared"] += 1
            self.world.started()
        elif result is not None and self._edits != self._before:
            self.world.checker.counts["edits taken back"] += 1
            self._desire(self._before)


@cache
def layer(edits: Edits) -> Layer:
    """A layer of so many experts; what they compute is nobody's business here."""
    rows = TensorSpec((2,), "float32")
    named = {f"e{n}": Expert("numpy:sin", kwargs={"edit": count}, input=rows) for n, count in enumerate(edits)}
    return Layer("l", gates.Fixed([1.0] * len(edits)), named, input=rows)
