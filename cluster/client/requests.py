"""Converts a caller's arguments to the fields of a request, with the checks of the server."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, fields
from typing import Any

from ...experts.errors import ExpertMeshError, FailedPrecondition, InvalidRequest
from ...experts.protocol import MAX_INT, CallOptions, from_mapping
from ...experts.spec import is_number
from ..rpc.changes import check_scale
from ..rpc.documents import MAX_DEPTH, is_deep, to_tensor
from ..rpc.swaps import SwapAsked
from .half_precision import AS_IT_IS, check_payload_dtype


def half_dtype(payload_dtype: object) -> str | None:
    """The half-precision dtype for float32 rows, None for float32 itself. Raises InvalidRequest for an unknown one."""
    check_payload_dtype(payload_dtype)
    return payload_dtype if isinstance(payload_dtype, str) and payload_dtype != AS_IT_IS else None


def check_timeout(timeout: float) -> float:
    """Check a timeout in seconds, finite and above 0. Raises InvalidRequest."""
    if not is_number(timeout):
        raise InvalidRequest("timeout must be a number of seconds")
    if not 0 < timeout < MAX_INT:  # also what is no number, and whole numbers that no float holds
        raise InvalidRequest("timeout must be a finite number of seconds above 0, and less than 2**63")
    return float(timeout)


def expert_names(names: Sequence[str] | None) -> list[str] | None:
    """The ids of `allow` or `deny`. Raises InvalidRequest for a single string."""
    if isinstance(names, str):
        raise InvalidRequest(f"allow and deny take a list of experts, as in [{names!r}]")
    if names is not None and not isinstance(names, Iterable):
        raise InvalidRequest(f"allow and deny take a list of experts, not {type(names).__name__}")
    return None if names is None else list(names)


def call_fields(options: CallOptions) -> dict[str, Any]:
    """The options of a call that differ from their defaults, with the checks of the server."""
    changed = {item.name: getattr(options, item.name) for item in fields(options) if not _is_default(options, item)}
    from_mapping(CallOptions, changed)
    return changed


def _is_default(options: CallOptions, item: Field[Any]) -> bool:
    value = getattr(options, item.name)
    return value is item.default or (type(value) is type(item.default) and value == item.default)


def swap_request(
    changes: dict[str, dict[str, Any]],
    expect: Mapping[str, str] | None,
    policy: dict[str, Any],
    mode: str,
    timeout: float,
    dry_run: bool,
    swap_id: str | None,
    adopts: Mapping[str, str] | None = None,
) -> SwapAsked:
    """Build the request for a swap, with the checks of the server. Raises InvalidRequest."""
    fields = {
        "swap_id": uuid.uuid4().hex if swap_id is None else swap_id, "changes": changes, "expect": dict(expect or {}),
        "policy": policy, "mode": mode, "timeout": timeout, "dry_run": dry_run, "adopts": dict(adopts or {}),
    }  # fmt: skip
    if is_deep(fields):
        raise InvalidRequest(f"the swap cannot be sent: its args or kwargs are nested deeper than {MAX_DEPTH}")
    request = from_mapping(SwapAsked, fields)
    request.read_changes()
    try:
        to_tensor(asdict(request))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the swap cannot be sent as JSON: {error}") from None
    return request


def scale_asked(what: object, replicas: object) -> dict[str, int]:
    """The numbers of replicas asked for, by id, of `scale("news/e3", 4)` or `scale({"news/e3": 4})`.

    Raises InvalidRequest.
    """
    asked = {what: replicas} if isinstance(what, str) else what
    if not isinstance(asked, Mapping) or not asked or (asked is what and replicas is not None):
        raise InvalidRequest('say what to scale, as in scale("news/e3", replicas=4) or scale({"news/e3": 4})')
    for id, number in asked.items():
        check_scale(id, number)
    return dict(asked)


def pin_of(lease_id: str, address: str) -> str:
    """The id of a lease that also says which router gave it; in the router's own process that goes without saying."""
    return f"{lease_id}@{address}" if address else lease_id


def with_unknown_outcome(error: ExpertMeshError, id: str, what: str = "swap") -> ExpertMeshError:
    """The error of a swap or change whose outcome is unknown, with the way to learn it."""
    error.message += f"; the outcome of {what} {id} is unknown: ask again with {what}_id={id!r}"
    error.args = (error.message,)
    return error


def around(id: str, history: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The current version in a history, and the one before it. Raises FailedPrecondition."""
    versions = [str(item.get("version")) for item in history]
    positions = [position for position, item in enumerate(history) if item.get("current")]
    if not positions:
        raise FailedPrecondition(f"{id} has no current version: it is not declared, or still starting")
    return versions[positions[0]], versions[positions[0] - 1] if positions[0] else None
