"""The messages of expertmesh as plain records: a client's request and reply, and those of router and experts.

Standard library only; the type of tensors depends on the process (torch in the cluster).
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
MAX_INT = 2**63


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """A client's request to one layer, without its tensors `x`, `gate_input`, `top_k_index`, `top_k_weights`.

    `epoch` requires exactly that epoch; `pin` is the id of a lease on one. `min_epoch` is the highest epoch that the
    client has seen of `cluster`; other clusters ignore it.
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
    """The reply to a client, without the tensors `output`, `lost_mass` and on demand `indices` and `weights`.

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
    """A weighted sum of the parts `first:last` of a message, computed by the replica, over rows `start:stop`."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class ExpertCall:
    """One message to one replica: each row once, and which rows each expert computes.

    `rows` is [R, ...]; `row_index` is int64 [N] into it, grouped by part, or None if each part has its own rows.
    `weights` float [N] are the factors of the pairs in `sums`, or None without sums. `timeout` is the longest remaining
    time, in seconds, of the requests that wait for the call.
    """

    attempt: int
    parts: tuple[Part, ...]
    rows: Any
    row_index: Any = None
    weights: Any = None
    sums: tuple[PartialSum, ...] = ()
    timeout: float = math.inf

    @property
    def size(self) -> int:
        """The number of rows that it carries."""
        return int(self.rows.shape[0])


@dataclass(frozen=True)
class PartFailure:
    """The error of an expert on its part: the name of the error class, and a message."""

    error: str
    message: str


@dataclass(frozen=True)
class ExpertReply:
    """The answer to an `ExpertCall`.

    `outputs` has one entry per part: its rows [stop - start, ...] or its failure; None for a part that went into a sum.
    `sums` has the rows [stop - start, ...] of each partial sum, or its failure. `lost` holds the pairs, int64, that no
    sum contains because their answer is not finite; None if there are none. `queued` and `computed` are the seconds
    that the call waited in the replica, and that its experts took.
    """

    incarnation: str
    outputs: tuple[Any | PartFailure | None, ...]
    sums: tuple[Any | PartFailure, ...] = ()
    lost: Any = None
    queued: float = 0.0
    computed: float = 0.0


@dataclass(frozen=True)
class TrainCall:
    """One message of training to one replica: an operation, its fields and its tensors by name (`training/desk.py`).

    `timeout` is the remaining time of its caller, in seconds.
    """

    attempt: int
    meta: Mapping[str, Any]
    tensors: Mapping[str, Any]
    timeout: float = math.inf

    @property
    def size(self) -> int:
        """The number of rows that it carries."""
        rows = self.tensors.get("rows")
        return int(rows.shape[0]) if rows is not None and rows.shape else 0

    @property
    def expert(self) -> str:
        """The id of the first expert that it concerns."""
        parts = self.meta.get("parts")
        return str(parts[0][0]) if isinstance(parts, list) and parts and isinstance(parts[0], list) else ""


@dataclass(frozen=True)
class TrainReply:
    """The answer to a `TrainCall`: `outcomes` has an entry for each of its parts, beside tensors by name."""

    incarnation: str
    outcomes: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Any] = field(default_factory=dict)


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a record from an untrusted map: exactly its fields, exactly their types, numbers finite and of 64 bits.

    Raises InvalidRequest naming the field.
    """
    hints = _hints(cast(Any, cls))
    items = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in items:
            raise InvalidRequest(f"unknown field {name[:64]!r}; the fields are {', '.join(items)}")
        if not _fits(value, hints[name]):
            if type(value) is int and not -MAX_INT <= value < MAX_INT:
                raise InvalidRequest(f"field {name} must be a number of at most 64 bits")
            raise InvalidRequest(f"field {name} has the wrong type: expected {_type_name(hints[name])}")
    for name, item in items.items():
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
    if type(value) is int and not -MAX_INT <= value < MAX_INT:
        return False  # beyond 64 bits, where SQLite, torch and floats end
    if hint is float:
        return type(value) is int or (isinstance(value, float) and math.isfinite(value))
    return type(value) is hint
