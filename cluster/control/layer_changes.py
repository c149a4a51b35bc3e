"""What is asked of the owner about layers: experts that come and go, with the layer's new gate, and whole layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...experts.spec import Autoscale, Expert
from ...router.gates import Gate

ADD, CHANGE, REMOVE = "add", "change", "remove"


@dataclass(frozen=True, kw_only=True)
class LayerEdit:
    """What becomes of one layer: it is added, changed or removed, as `kind` says.

    `experts` and `shared` are those that come, by name, and `remove` names those that go. `order` are the names of all
    routed experts afterwards, in the order of the gate; by default those that stay, then those that come. `gate` is
    the layer's new gate, or the file that `Gate.save` wrote; None keeps the one that serves. `settings` are fields of
    `Layer`: combine, on_missing, max_lost_mass, on_dropped, capacity, input. `autoscale` are the rules of experts or
    packs by name, None to have none.
    """

    kind: str = CHANGE
    experts: Mapping[str, Expert] = field(default_factory=dict)
    shared: Mapping[str, Expert] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    gate: Gate | Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    autoscale: Mapping[str, Autoscale | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayersRequest:
    """Edits of layers, by name, that become one epoch: all of them or none, within `timeout` seconds.

    `adopts` are the digests of the declarations that they carry out, by id. `allow_unverified` accepts experts that
    cannot be tried, because no rows were declared or served.
    """

    change_id: str
    layers: Mapping[str, LayerEdit]
    adopts: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 120.0
    allow_unverified: bool = False
