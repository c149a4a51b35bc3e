"""The records of what clients ask of the owner: other numbers of replicas, and experts and layers that come and go.

They are JSON documents. No torch here, because the client imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...experts.errors import InvalidRequest
from ...experts.names import GATE, LAYER, is_name
from ...experts.protocol import from_mapping
from .swaps import MAX_CHANGES, MAX_TIMEOUT, SHA256, check_upload

MOST_REPLICAS = 1000
"""The maximum number of replicas of an expert that can be asked for."""

KINDS = ADD, CHANGE, REMOVE = "add", "change", "remove"
SETTINGS = ("combine", "on_missing", "max_lost_mass", "on_dropped", "capacity", "input")
"""The fields of a layer that can be asked for."""


@dataclass(frozen=True, kw_only=True)
class ScaleAsked:
    """A client's request for other numbers of replicas, by the id of an expert or pack."""

    change_id: str
    replicas: dict[str, int]
    timeout: float = 120.0

    def check(self) -> None:
        """Check the numbers. Raises InvalidRequest."""
        check_bounds("scale", "ids", self.replicas, self.timeout)
        for id, number in self.replicas.items():
            check_scale(id, number)


@dataclass(frozen=True, kw_only=True)
class UploadAsked:
    """A file that was uploaded."""

    upload: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExpertAsked:
    """An expert that comes: what it computes, where it runs, and how often. `input` and `output` are [shape, dtype].

    `weights` is a map of `UploadAsked`, and `autoscale` one of `Autoscale`.
    """

    factory: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    framework: str | None = None
    weights: dict[str, Any] | None = None
    input: list[Any] | None = None
    output: list[Any] | None = None
    replicas: int = 1
    pack: str | None = None
    num_cpus: float | None = None
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    autoscale: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LayerAsked:
    """What becomes of one layer: see `LayerEdit`, whose JSON this is. `gate` is a map of `UploadAsked`."""

    kind: str = CHANGE
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    autoscale: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def check(self) -> None:
        """Check that it says something, once. Raises InvalidRequest."""
        if self.kind not in KINDS:
            raise InvalidRequest(f"kind must be one of {', '.join(KINDS)}, not {self.kind[:64]!r}")
        says = any((self.experts, self.shared, self.remove, self.order, self.gate, self.settings, self.autoscale))
        if says == (self.kind == REMOVE):
            raise InvalidRequest("a layer that is removed takes nothing else" if says else "say what is to change")
        if self.kind == ADD and not self.experts:
            raise InvalidRequest("a layer that is added needs experts")
        comes = [*self.experts, *self.shared]
        for name in (*comes, *self.remove, *self.order):
            check_part(name)
        if twice := (set(self.experts) & set(self.shared)) | (set(comes) & set(self.remove)):
            raise InvalidRequest(f"expert {min(twice)!r} is named twice; one that goes cannot come in the same change")
        if unknown := sorted(set(self.settings) - set(SETTINGS)):
            raise InvalidRequest(f"there is no setting {unknown[0][:64]!r}; a layer has {', '.join(SETTINGS)}")


@dataclass(frozen=True, kw_only=True)
class LayersAsked:
    """A client's request for a change of layers, by name, each a map of `LayerAsked`: all of them or none.

    `adopts` and `versions` are as in `LayersRequest`.
    """

    change_id: str
    layers: dict[str, dict[str, Any]]
    adopts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timeout: float = 120.0
    allow_unverified: bool = False

    def read(self) -> dict[str, LayerAsked]:
        """Read and check the layers. Raises an InvalidRequest that names the layer."""
        check_bounds("a change", "layers", self.layers, self.timeout)
        found = {}
        for name, asked in self.layers.items():
            check_part(name, "layer")
            try:
                found[name] = from_mapping(LayerAsked, asked)
                found[name].check()
            except InvalidRequest as error:
                raise InvalidRequest(f"layer {name}: {error.message}") from None
        experts = sum(len(layer.experts) + len(layer.shared) for layer in found.values())
        check_bounds("a change", "experts", range(experts + 1), self.timeout)
        for id in (*self.adopts, *self.versions):
            if id.partition("/")[0] not in found:
                raise InvalidRequest(f"{id[:140]} is in no layer of the change")
        if wrong := [id for id, digest in self.adopts.items() if not SHA256.fullmatch(digest)]:
            raise InvalidRequest(f"adopts: {wrong[0][:140]} must have a digest of 64 lower-case hex digits")
        return found


def read_expert(id: str, asked: Mapping[str, Any]) -> ExpertAsked:
    """Read an expert that comes. Raises an InvalidRequest that names its id."""
    try:
        expert = from_mapping(ExpertAsked, asked)
        if not 1 <= expert.replicas <= MOST_REPLICAS:
            raise InvalidRequest(f"replicas must be from 1 to {MOST_REPLICAS}, not {expert.replicas}")
    except InvalidRequest as error:
        raise InvalidRequest(f"{id}: {error.message}") from None
    return expert


def read_upload(what: str, asked: Mapping[str, Any]) -> UploadAsked:
    """Read which upload is meant. Raises an InvalidRequest that names what it is of."""
    try:
        upload = from_mapping(UploadAsked, asked)
        check_upload(upload.upload, upload.sha256)
    except InvalidRequest as error:
        raise InvalidRequest(f"{what}: {error.message}") from None
    return upload


def check_part(name: object, what: str = "expert") -> None:
    """Check the name of an expert or layer. Raises InvalidRequest."""
    if not is_name(name) or (what == "expert" and name in (GATE, LAYER)):
        raise InvalidRequest(f"{str(name)[:64]!r} is no name of {'a layer' if what == 'layer' else 'an expert'}")


def check_bounds(what: str, of: str, named: Any, timeout: float) -> None:
    """Check how much a change is about, and its timeout. Raises InvalidRequest."""
    if not 1 <= len(named) <= MAX_CHANGES:
        raise InvalidRequest(f"{what} is about 1 to {MAX_CHANGES} {of}, not {len(named)}")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise InvalidRequest(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} seconds, not {timeout:g}")


def check_scale(id: object, number: object) -> None:
    """Check a number of replicas. Raises InvalidRequest that names its id."""
    if not isinstance(id, str):
        raise InvalidRequest(f"scale takes the ids of experts or packs, not {type(id).__name__}")
    if type(number) is not int or not 1 <= number <= MOST_REPLICAS:
        raise InvalidRequest(f"{id[:140]}: replicas must be a whole number from 1 to {MOST_REPLICAS}, not {number!r}")
