"""Builds candidates: from what is declared, from what came over the network, from a version that there was."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...experts.construct.probe import without_weights
from ...experts.errors import ConfigError, DataLoss, FailedPrecondition, InvalidRequest, NotFound
from ...experts.names import is_layer_id
from ...experts.spec import Expert
from ...experts.weights.files import described, load_into, load_tensors
from ...experts.weights.inspect import inspect_artefact
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..config.declared_document import behaviour, declared_document
from ..config.layer_document import layer_digest
from ..state.records import VersionRecord
from ..state.registry import Registry
from ..state.version_folders import VersionStore
from .candidate_records import (
    declared_candidates,
    declared_digest,
    declared_gate_digest,
    expert_of,
    factory_code,
    from_record,
    origin_of,
)
from .messages import Candidate, Change, SwapRequest

log = logging.getLogger(__name__)


class CandidateBuilder:
    """Knows what every id is declared to be, and what its versions are made of.

    `digests` tell an edited declaration; `built` holds candidates of live objects, which no file can bring back.
    """

    def __init__(self, registry: Registry, store: VersionStore) -> None:
        self._registry = registry
        self._store = store
        self.declared: dict[str, Candidate] = {}
        self.digests: dict[str, str] = {}
        self._codes: dict[str, str] = {}
        self._resumed: Collection[str] = frozenset()
        self.built: dict[tuple[str, str], Candidate] = {}
        self._layers: Mapping[str, Layer] = {}

    def declare(self, layers: Mapping[str, Layer], owner: str = "", resumed: Collection[str] = frozenset()) -> None:
        """Take the layers that an owner declares. What is `resumed` is declared as the registry has it."""
        self.declared, self.digests, self._codes, self._layers = {}, {}, {}, layers
        for layer in layers.values():
            self.declared |= declared_candidates(layer)
            for id, expert in layer.everyone_by_id.items():
                self._codes[id] = factory_code(expert)
                if id not in resumed:
                    self.digests[id] = declared_digest(expert, owner, self._codes[id])
            self.digests[layer.gate_id] = declared_gate_digest(layer.gate)
            self.digests[layer.layer_id] = layer_digest(layer)
        self._resumed = self.declared.keys() & resumed
        for id in self._resumed:
            self.digests[id] = self._registry.declared(id) or ""

    def document(self, settings: Mapping[str, Any], replicas: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The document of what is declared, and of what a swap has brought in its place by `adopts`.

        `replicas` are the ids of those that are wanted.
        """
        document = declared_document(self._layers.values(), self.digests, self._codes, settings)
        document["replicas"] = dict(Counter(replica.rpartition("#")[0] for replica in replicas))
        epoch = self._registry.current()
        for id, value in [*document["gates"].items(), *document["experts"].items()]:
            adopted = self._registry.declared(id)
            differs = id in self._resumed or adopted not in (None, value["digest"])
            if epoch is not None and id in epoch.versions and adopted is not None and differs:
                origin = self._registry.version(id, epoch.versions[id]).origin
                if "factory" in origin:
                    expert = expert_of(origin)
                    value |= {**behaviour(expert), "code": factory_code(expert)}
                value["digest"] = adopted
        return document

    def check_fits(self, id: str, version: str) -> None:
        """Hold a gate that serves on against its layer, which was edited. Raises FailedPrecondition."""
        gate, layer = self.recorded(id, version).gate, self._layers[id.partition("/")[0]]
        try:
            replace(layer, gate=gate or layer.gate)
        except ConfigError as error:
            raise FailedPrecondition(
                f"{id}: {version} was swapped in and does not fit the edited declaration: {error.message}. Name it in "
                "`redeclare` to replace it by the declared one"
            ) from None

    def check_runs(self, number: int, versions: Mapping[str, str], replicas: Mapping[str, Collection[str]]) -> None:
        """Raise FailedPrecondition for an epoch of which a layer that is still declared has lost experts.

        `replicas` are there, each for some ids.
        """
        there = {id for experts in replicas.values() for id in experts}
        layers = [id for id in versions if is_layer_id(id)]
        named = [self.recorded(id, versions[id]).layer for id in layers if id in self.declared]
        gone = {id for layer in named if layer is not None for id in layer.everyone_by_id} - there
        if gone or not layers:
            why = f"{min(gone)} was removed since" if gone else "it is from before layers had versions"
            raise FailedPrecondition(f"epoch {number} cannot be served any more: {why}")

    def unknown(self, id: str) -> NotFound:
        """The error for an id that is not declared."""
        return NotFound(f"there is no expert or gate {id!r}; known are {', '.join(sorted(self.declared)[:20])}")

    def history(self, id: str) -> list[dict[str, Any]]:
        """The versions of an id that are kept, oldest first, and which epochs name them. Raises NotFound."""
        records, declared = self._registry.history(id), id in self.declared
        if not declared and not records:
            raise self.unknown(id)
        epochs = self._registry.epochs()
        current = epochs[-1].versions.get(id) if epochs else None
        return [
            {
                "version": record.version,
                "created": record.created,
                "parent": record.parent,
                "nbytes": record.nbytes,
                "note": record.note,
                "ephemeral": record.ephemeral,
                "current": record.version == current and declared,
                "declared": declared,
                "epochs": [epoch.number for epoch in epochs if epoch.versions.get(id) == record.version],
            }
            for record in records
        ]

    def recorded(self, id: str, version: str) -> Candidate:
        """The candidate that loads a version of the registry again. Raises NotFound, FailedPrecondition or DataLoss."""
        return self.of_record(self._registry.version(id, version))

    def candidate(self, id: str, change: Change, request: SwapRequest, current: Mapping[str, str]) -> Candidate:
        """The candidate that a change asks for. Raises what is wrong with it, before anything is staged."""
        if is_layer_id(id) and not change.declared:
            raise InvalidRequest(f"{id} is what a layer is made of: add or remove experts, or use `expertmesh apply`")
        replaces = current.get(id)
        common: dict[str, Any] = {"replaces": replaces, "policy": request.policy, "mode": request.mode}
        if change.version is not None:
            back = self.of_record(self._registry.version(id, change.version))
            if back.gate is not None:
                self._check_number(id, back.gate)
            return replace(back, **common, note=f"rollback {change.version}")
        if change.declared:
            base = self.declared[id]
        elif change.expert is not None:
            base = self._of_factory(id, change.expert, replaces or "")
        else:
            base = self._base(id, replaces or "")
        if change.upload is not None:
            base = self._with_upload(id, base, change)
        if base.gate is not None and not change.declared:
            self._check_number(id, base.gate)
        names_code = change.declared or change.expert is not None
        return replace(base, counter=self._registry.next_counter(id), names_code=names_code, **common)

    def _check_number(self, id: str, gate: Gate) -> None:
        """Hold a gate against its layer, whose experts may be others than when it was made."""
        wanted = len(self._layers[id.partition("/")[0]].experts)
        if gate.num_experts != wanted:
            raise FailedPrecondition(f"{id} picks among {gate.num_experts} experts, but the layer has {wanted}")

    def _base(self, id: str, version: str) -> Candidate:
        """What a new version takes over from the current one, or from the declaration where that one is damaged."""
        try:
            return self.recorded(id, version)
        except (DataLoss, NotFound) as error:
            log.warning("%s; what replaces it is built as declared", error)
            return self.declared[id]

    def _of_factory(self, id: str, expert: Expert, replaces: str) -> Candidate:
        """The candidate of another factory, for the same rows and in the same place."""
        base = self._base(id, replaces)
        if base.expert is None:
            raise InvalidRequest(f"{id} is a gate, and gates have no factory: swap in its weights")
        expert = replace(expert, input=base.expert.input, output=base.expert.output)
        return replace(
            base, expert=expert, weights=None, version=None, origin=origin_of(expert), note=f"factory {expert.factory}"
        )

    def _with_upload(self, id: str, base: Candidate, change: Change) -> Candidate:
        """The candidate with uploaded weights in place of its own, which were inspected without building it."""
        path = self._store.upload_path(change.upload or "")
        if base.gate is not None:
            wanted = described(base.gate.state_dict())
        elif base.expert is not None:
            wanted = described(without_weights(base.expert).state())
        if not wanted:
            raise FailedPrecondition(f"{id} has no tensors that weights could replace")
        owner = "gate" if base.gate else "expert"
        found = inspect_artefact(path, sha256=change.sha256, wanted=wanted, owner=owner, infinities=base.gate is None)
        gate = None
        if base.gate is not None:
            gate = copy.deepcopy(base.gate)  # that of `base` may be needed again
            load_into(gate, load_tensors(path)[0], "the uploaded gate")
        uploaded = replace(base, version=None, weights=path, uploaded=True, note="upload")
        return replace(uploaded, gate=gate, tensor_digest=found.tensor_digest)

    def of_record(self, record: VersionRecord) -> Candidate:
        """The candidate that loads a version again, from disk or from the live object that was declared."""
        built = self.built.get((record.id, record.version))
        if built is not None:
            return replace(built, version=record.version, counter=record.counter)
        declared = self.declared.get(record.id)
        live = {} if declared is None else {(record.id, record.version): declared}
        if not record.origin.get("live"):
            live = {}
        candidate = from_record(record, self._store, live)
        weights = self._store.weights(record.id, record.version) if candidate.gate is None else candidate.weights
        candidate = replace(candidate, counter=record.counter, weights=weights or candidate.weights)
        return candidate if declared is None else replace(candidate, input=declared.input, output=declared.output)
