"""The catalogue: what every id is declared to be, and what its versions are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..experts.artefact import inspect_artefact
from ..experts.errors import FailedPrecondition, InvalidRequest
from ..experts.factory import build
from ..experts.tensors import dtype_name
from ..experts.weights import load_into, load_tensors
from ..router.layer import Layer
from .definitions import declared_candidates, declared_digest, declared_gate_digest, from_record
from .orders import Candidate, Change, SwapRequest
from .records import VersionRecord
from .registry import Registry
from .versions import VersionStore


class Catalogue:
    """Makes candidates: of a declaration, of uploaded weights, of a version that there was.

    `digests` tell an edited declaration; `built` holds candidates of live objects, which no file can bring back.
    """

    def __init__(self, registry: Registry, store: VersionStore) -> None:
        self._registry = registry
        self._store = store
        self.declared: dict[str, Candidate] = {}
        self.digests: dict[str, str] = {}
        self.built: dict[tuple[str, str], Candidate] = {}

    def declare(self, layers: Mapping[str, Layer]) -> None:
        """Take the declared layers."""
        self.declared, self.digests = {}, {}
        for layer in layers.values():
            self.declared |= declared_candidates(layer)
            self.digests |= {id: declared_digest(expert) for id, expert in layer.everyone_by_id.items()}
            self.digests[layer.gate_id] = declared_gate_digest(layer.gate)

    def recorded(self, id: str, version: str) -> Candidate:
        """The candidate that loads a version of the registry again. Raises NotFound, FailedPrecondition or DataLoss."""
        return self.of_record(self._registry.version(id, version))

    def candidate(self, id: str, change: Change, request: SwapRequest, current: Mapping[str, str]) -> Candidate:
        """The candidate that a change asks for. Raises what is wrong with it, before anything is staged."""
        replaces = current.get(id)
        common: dict[str, Any] = {"replaces": replaces, "policy": request.policy, "mode": request.mode}
        if change.version is not None:
            record = self._registry.version(id, change.version)
            return replace(self.of_record(record), **common, note=f"rollback {change.version}")
        counter = self._registry.next_counter(id)
        if change.upload is not None:
            return self._uploaded(id, change, counter, replaces or "", common)
        declared = self.declared[id]
        if change.expert is not None and change.expert is not declared.expert:
            raise InvalidRequest(f"{id}: a declaration comes from the owner of the cluster alone")
        return replace(declared, counter=counter, **common)

    def _uploaded(self, id: str, change: Change, counter: int, replaces: str, common: Mapping[str, Any]) -> Candidate:
        base = self.recorded(id, replaces)
        path = self._store.upload_path(change.upload or "")
        if base.gate is not None:
            wanted = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in base.gate.state_dict().items()}
        elif base.expert is not None:
            function = build(base.expert, "meta", load_weights=False)
            wanted = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in function.state().items()}
        if not wanted:
            raise FailedPrecondition(f"{id} has no tensors that weights could replace")
        inspect_artefact(path, sha256=change.sha256, wanted=wanted, owner="gate" if base.gate else "expert")
        candidate = replace(base, counter=counter, version=None, weights=path, note="upload", **common)
        if base.gate is not None:
            load_into(base.gate, load_tensors(path)[0], "the uploaded gate")  # `base` was read from disk: it is ours
        return candidate

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
        return replace(candidate, counter=record.counter, weights=weights or candidate.weights)
