"""The messages of expertmesh as plain records: what a client asks, what it is told, what router and experts exchange.

Standard library only; a tensor in a record is whatever the process at hand uses (torch on the cluster's side).
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What a client asks of one layer, beside its tensors `x`, `gate_input`, `top_k_index`, `top_k_weights`.

    `epoch` asks for exactly that epoch, `pin` is the id of a lease on one. `min_epoch` is the highest epoch that the
    client has seen of `cluster`: it means nothing to another cluster.
    """

    layer: str
    request_id: str | None = None
    top_k: int | None = None
    allow: list[str] | None = None
    deny: list[str] | None = None
    on_missing: str | None = None
    max_lost_mass: float | None = None
    return_routing: bool = False
    epoch: int | None = None
    min_epoch: int = 0
    cluster: str = ""
    pin: str | None = None


@dataclass(frozen=True, kw_only=True)
class CallSummary:
    """What a client is told, beside the tensors `output`, `lost_mass` and on demand `indices` and `weights`.

    `versions` names every expert that took part, and the gate: {"news/e0": "v1-3fa1c2d40b9e", "news/gate": ...}.
    `cluster` is the id of the cluster that numbers the epochs.
    """

    request_id: str
    epoch: int
    versions: dict[str, str]
    degraded: bool = False
    missing: list[str] = field(default_factory=list)
    max_lost_mass: float = 0.0
    dropped: int = 0
    cluster: str = ""


@dataclass(frozen=True)
class Part:
    """Rows for one expert in one message: pairs `start:stop` of its row index, or of its rows where it has none."""

    expert: str
    version: str
    start: int
    stop: int


@dataclass(frozen=True)
class PartialSum:
    """Parts `first:last` of a message are weighted and added up where they are computed, into rows `start:stop`."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class ExpertCall:
    """One message to one replica: each row once, and which rows each expert computes.

    `rows` is [R, ...]; `row_index` is int64 [N] into it, grouped by part, or None where each part has rows of its own.
    `weights` float [N] are the factors of the pairs in `sums`, and None where there are none. `timeout` is how many
    seconds the most patient of those who wait has left.
    """

    attempt: int
    parts: tuple[Part, ...]
    rows: Any
    row_index: Any = None
    weights: Any = None
    sums: tuple[PartialSum, ...] = ()
    timeout: float = math.inf


@dataclass(frozen=True)
class PartFailure:
    """Why one expert gave no answer for its part: the class of the error, by name, and a message."""

    error: str
    message: str


@dataclass(frozen=True)
class ExpertReply:
    """The answer to an `ExpertCall`.

    `outputs` has one entry per part: its rows [stop - start, ...], or why there are none; None for a part that went
    into a sum. `sums` has the rows [stop - start, ...] of each partial sum, or why there are none. `lost` holds the
    pairs, int64, that no sum contains because their answer is not finite; None where there are none. `queued` and
    `computed` are the seconds that the call waited in the replica, and that its experts took.
    """

    incarnation: str
    outputs: tuple[Any | PartFailure | None, ...]
    sums: tuple[Any | PartFailure, ...] = ()
    lost: Any = None
    queued: float = 0.0
    computed: float = 0.0


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a record from an untrusted map: exactly its fields, exactly their types, numbers finite.

    Raises InvalidRequest naming the field.
    """
    hints = _hints(cast(Any, cls))
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"unknown field {name[:64]!r}; known are {', '.join(known)}")
        if not _fits(value, hints[name]):
            raise InvalidRequest(f"field {name} has the wrong type: {_type_name(hints[name])} expected")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InvalidRequest(f"field {name} is missing")
    return cls(**values)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _type_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)) if get_origin(hint) is None else str(hint)


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        key_hint, value_hint = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key_hint) and _fits(v, value_hint) for k, v in value.items())
    if hint is float:
        return type(value) is int or (isinstance(value, float) and math.isfinite(value))
    return type(value) is hint
