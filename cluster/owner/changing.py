"""Changes of what a cluster declares while it serves: an expert is replaced, experts and layers come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...experts.errors import (
    ConfigError,
    DataLoss,
    ExpertMeshError,
    FailedPrecondition,
    Fenced,
    NotFound,
    Unavailable,
)
from ...experts.names import GATE, is_gate_id, is_layer_id
from ...experts.spec import Expert, check_expert
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..config.layer_changes import LayerEdit, LayersRequest, edited
from ..config.preflight import check_layer
from ..control.ports import ControllerState
from ..machine.durable_files import hash_file
from ..placement.capacity import unplaceable
from ..placement.plan import PlannedReplica, groups_of
from ..runtime.backend import Backend
from ..state.version_folders import VersionStore
from .declaring import Declaring
from .topology import UNDO_SECONDS, Scaling, Topology, by_group, together, topology_of, wait_for

BEHAVIOUR = ("factory", "args", "kwargs", "weights", "input", "output", "framework", "live")
"""The fields of an expert that define what it computes; the others define where and how often it runs."""

RETIRE_SECONDS = 10.0
"""How long a change waits until nothing needs what it took away; it is ended later otherwise."""

LOOK_SECONDS = 0.1
OPEN = (Unavailable, Fenced)
"""What leaves it open whether a declaration is carried out."""

log = logging.getLogger(__name__)


class Changing:
    """Changes the layers of a running cluster, one change after another. `start` starts a replica."""

    def __init__(
        self,
        declared: Declaring,
        backend: Callable[[], Backend],
        start: Callable[[PlannedReplica], None],
        state_dir: Callable[[], Path],
        *,
        code_elsewhere: bool = False,
        factories: Collection[str] = (),
    ) -> None:
        """`factories` is the code that a gate which comes as a file may run."""
        self._state_dir = state_dir
        self._declared = declared
        self._backend = backend
        self._start = start
        self._code_elsewhere = code_elsewhere
        self._factories = factories

    def replace(self, expert_id: str, expert: Expert, timeout: float, *, unverified: bool) -> tuple[str | None, str]:
        """Replace what one expert computes; returns its versions before and after. As `Cluster.replace`."""
        check_expert(expert, f"the replacement of {expert_id}")
        layer_name, _, name = expert_id.partition("/")
        old = self._declared.layers
        if layer_name not in old or name not in old[layer_name].everyone:
            ids = [id for layer in old.values() for id in layer.everyone_by_id]
            raise NotFound(f"there is no expert {expert_id!r}; the cluster has {', '.join(sorted(ids)[:20])}")
        before = old[layer_name].everyone[name]
        placed = replace(before, **{f.name: getattr(expert, f.name) for f in fields(Expert) if f.name in BEHAVIOUR})
        layer = old[layer_name].with_experts({**old[layer_name].everyone, name: placed})
        checked = self._checked(layer, old[layer_name], {expert_id})
        serves, named = self._backend().state().versions.get(expert_id), frozenset({expert_id})
        try:
            versions = self._declared.declare(
                self._backend(), {**old, layer_name: checked}, timeout, named, renewed=named, unverified=unverified
            )
        except BaseException:
            self._declared.declare(self._backend(), old, timeout, named)
            raise
        return serves, versions[expert_id]

    def change(self, request: LayersRequest) -> dict[str, Any]:
        """Carry out edits of layers; returns the epoch, the experts of each layer before and after, and the versions.

        Raises what is wrong with them, and then all is as before, and Unavailable with a message that says so where
        the controller was not reached any more.
        """
        deadline = time.monotonic() + request.timeout
        for path, sha256 in request.files.items():
            _check_upload(path, sha256)
        request = replace(request, layers=self._with_gates(request))
        old, before = self._declared.layers, self._declared.topology
        new = edited(old, request.layers, self._factories)
        affected = Affected.of(old, new, request)
        new |= {name: self._checked(new[name], old.get(name), affected.built) for name in request.layers if name in new}
        after = topology_of(new.values(), _still_there(before.scaled, new.values()))
        both = together(before, after)
        if problem := unplaceable([*both.planned.values()], self._backend().nodes()):
            raise ConfigError(problem)
        fresh = [replica for id, replica in both.planned.items() if id not in before.planned]
        try:
            for replica in fresh:
                self._start(replica)
            wait_for(self._backend(), fresh, deadline, log.info)
            self._declared.topology = both
            versions = self._decided(old, new, affected, deadline)
        except _OutcomeUnknown as unknown:
            raise Unavailable(str(unknown)) from None
        except BaseException:
            self._declared.topology = before
            self._tell(old)
            for replica in fresh:
                self._backend().stop_replica(replica.id)
            raise
        epoch = self._state(time.monotonic() + UNDO_SECONDS).epoch
        with suppress(ExpertMeshError):  # what is left is ended later
            ends = min(deadline, time.monotonic() + RETIRE_SECONDS)
            while not self.retire() and time.monotonic() < ends:
                time.sleep(LOOK_SECONDS)
        return {
            "epoch": epoch,
            "layers": {name: {"before": _names(old, name), "after": _names(new, name)} for name in request.layers},
            "versions": {id: versions[id] for id in sorted(affected.named & versions.keys())},
        }

    def _with_gates(self, request: LayersRequest) -> dict[str, LayerEdit]:
        """The edits of a request, with the file of each gate that comes back."""
        edits = dict(request.layers)
        for name, edit in request.layers.items():
            gate_id = f"{name}/{GATE}"
            if gate_id in request.versions:
                version = request.versions[gate_id]
                path = VersionStore(self._state_dir()).weights(gate_id, version)
                if path is None:
                    raise FailedPrecondition(f"{gate_id} {version} was a live object, which no file can bring back")
                edits[name] = replace(edit, gate=Gate.load(path))
        return edits

    def scale(self, asked: Mapping[str, int], timeout: float) -> dict[str, dict[str, int]]:
        """Give experts or packs other numbers of replicas; returns those before and after. As `Cluster.scale`."""
        layers, before = self._declared.layers.values(), self._declared.topology
        wanted, numbers = by_group(layers, asked), before.numbers()
        after = together(self._leaving(), topology_of(layers, {**_still_there(before.scaled, layers), **wanted}))
        send = partial(self._declared.scale, self._backend())
        Scaling(self._backend(), self._start, send).change(before, after, timeout)
        return {group: {"before": numbers[group], "after": number} for group, number in wanted.items()}

    def retire(self) -> bool:
        """End the replicas of what was taken away, once no request can need it; returns whether none is left."""
        has, layers = self._declared.topology, self._declared.layers.values()
        wanted = topology_of(layers, _still_there(has.scaled, layers))
        if has.experts == wanted.experts:
            return True
        left = {id for experts in has.experts.values() for id in experts}
        left -= {id for experts in wanted.experts.values() for id in experts}
        if left & _with_epoch(self._backend().state()).used:
            return False
        send = partial(self._declared.scale, self._backend())
        Scaling(self._backend(), self._start, send).change(has, wanted, RETIRE_SECONDS)
        return True

    def _leaving(self) -> Topology:
        """The replicas of what was taken away, which requests may still need."""
        has, layers = self._declared.topology, self._declared.layers.values()
        there = {id for layer in layers for id in layer.everyone_by_id}
        return Topology(planned={id: one for id, one in has.planned.items() if not there >= one.experts.keys()})

    def _decided(
        self, old: Mapping[str, Layer], new: Mapping[str, Layer], affected: Affected, deadline: float
    ) -> Mapping[str, str]:
        """Declare the new layers; returns the versions that then serve.

        A controller that restarts is told again, as long as there is time. Afterwards the old ones are declared: then
        it is decided which of them serve. What is committed is not built once more: that might be refused.
        """
        before = dict(self._state(deadline).current)
        while True:
            try:
                return self._declare(new, affected, deadline - time.monotonic())
            except ExpertMeshError as error:
                failure = error
            if not isinstance(failure, OPEN) or time.monotonic() > deadline:
                break
            time.sleep(LOOK_SECONDS)
        ends, committed = time.monotonic() + UNDO_SECONDS, replace(affected, built=frozenset())
        while time.monotonic() < ends:
            try:
                is_committed = self._is_committed(old, before, affected)
            except OPEN:
                time.sleep(LOOK_SECONDS)
                continue
            if not is_committed:
                raise failure
            with suppress(ExpertMeshError):  # also where what it has replaced still drains
                return self._declare(new, committed, UNDO_SECONDS)
            time.sleep(LOOK_SECONDS)
        with suppress(ExpertMeshError):
            return self._declare(new, committed, LOOK_SECONDS)  # and again, once there is a controller
        raise _OutcomeUnknown(f"{failure.message}; the controller does not answer, and will be told again")

    def _is_committed(self, old: Mapping[str, Layer], before: Mapping[str, str], affected: Affected) -> bool:
        """Whether a change is durable. If not, it will not be: the old layers are declared. Raises what is `OPEN`."""
        backend = self._backend()
        state = backend.state()
        if state.epoch and _committed(state, before, affected):
            return True
        try:
            self._declared.declare(backend, old, UNDO_SECONDS)
        except OPEN:
            raise
        except ExpertMeshError as error:  # it was heard all the same, after what was told before
            log.debug("the old layers are refused: %s", error)
        return _committed(backend.state(), before, affected)

    def _state(self, deadline: float) -> ControllerState:
        """What the controller knows; one that has restarted is told what is declared first.

        Raises Unavailable where it does not answer in time.
        """
        while True:
            try:
                state = self._backend().state()
                self._declared.repeat(self._backend(), state.revision, max(1.0, deadline - time.monotonic()))
                return _with_epoch(state if state.epoch else self._backend().state())
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_SECONDS)

    def _declare(self, layers: Mapping[str, Layer], affected: Affected, timeout: float) -> Mapping[str, str]:
        return self._declared.declare(
            self._backend(),
            layers,
            max(1.0, timeout),
            affected.named,
            renewed=affected.built,
            unverified=affected.request.allow_unverified,
            removed=affected.removed,
            adopts=affected.request.adopts,
            versions=affected.request.versions,
        )

    def _tell(self, layers: Mapping[str, Layer]) -> None:
        """Go back to layers; a controller that does not answer is told when it does."""
        try:
            self._declared.declare(self._backend(), layers, UNDO_SECONDS)
        except ExpertMeshError as error:
            log.warning("the controller was not told yet to go back to what was declared: %s", error)

    def _checked(self, layer: Layer, before: Layer | None, new: Collection[str]) -> Layer:
        known = set() if before is None else before.everyone_by_id.keys() - set(new)
        return check_layer(layer, code_elsewhere=self._code_elsewhere, checked=known)


class _OutcomeUnknown(Exception):
    """The controller was not reached before it was known whether a change is durable."""


@dataclass(frozen=True, kw_only=True)
class Affected:
    """The ids that a request is about: the `named` are declared by name, the `built` among them are new, and the
    `removed` are in no layer any more."""

    request: LayersRequest
    named: frozenset[str]
    built: frozenset[str]
    removed: frozenset[str]

    @classmethod
    def of(cls, old: Mapping[str, Layer], new: Mapping[str, Layer], request: LayersRequest) -> Affected:
        """Compare the layers of a request before and after it."""
        before = {id for name in request.layers if name in old for id in _ids(old[name])}
        after = {id for name in request.layers if name in new for id in _ids(new[name])}
        gates = {new[name].gate_id for name, edit in request.layers.items() if edit.gate is not None}
        layers = {new[name].layer_id for name in request.layers if name in new}
        return cls(
            request=request,
            named=frozenset((after - before) | gates | layers),
            built=frozenset((after - before) | gates),
            removed=frozenset(before - after),
        )


def _committed(state: ControllerState, before: Mapping[str, str], affected: Affected) -> bool:
    """Whether the current epoch is one that the request has made. Raises Unavailable where there is none yet.

    A swap may have replaced a gate meanwhile, or an expert that goes: they tell nothing, unless only gates are new.
    """
    current, ids = _with_epoch(state).current, affected.named | affected.removed
    if any((id in current) != (id in before) for id in ids):
        return True
    gates_alone = not affected.removed and all(is_gate_id(id) for id in affected.built)
    return any(current.get(id) != before.get(id) for id in ids if is_layer_id(id) or (gates_alone and is_gate_id(id)))


def _with_epoch(state: ControllerState) -> ControllerState:
    if not state.epoch:
        raise Unavailable("the controller is restarting")
    return state


def _ids(layer: Layer) -> set[str]:
    return {layer.layer_id, layer.gate_id, *layer.everyone_by_id}


def _names(layers: Mapping[str, Layer], name: str) -> list[str]:
    return [*layers[name].everyone] if name in layers else []


def _still_there(scaled: Mapping[str, int], layers: Iterable[Layer]) -> dict[str, int]:
    """The numbers of replicas that were affected for, without those of groups that are no more."""
    groups = {group for layer in layers for group in groups_of(layer)}
    return {group: number for group, number in scaled.items() if group in groups}


def _check_upload(path: Path, sha256: str) -> None:
    """Check that an upload is there as it was announced. Raises DataLoss."""
    try:
        found = hash_file(path)[0]
    except OSError:
        found = "missing"
    if found != sha256:
        raise DataLoss(f"upload {path.name} is not complete, or was dropped: send it again")
