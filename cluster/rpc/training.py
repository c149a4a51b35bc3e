"""The requests of training, as both ends of gRPC agree on them.

A frame of kind "train" carries the fields of `TrainAsked`, and tensors by name:

    versions                                       the versions of a layer that serve, and its epoch
    forward    rows [T, ...], index [N], weights?  outputs [T, ...] = sum of w * f(x) over the parts that answered
    backward   ... and gradients [T, ...]          gradients: rows [T, ...], weights [N]
    open       replicas                            a session, on copies of what serves; step 0 is durable
    resume     caller?                             a session again, at its durable step, with what its caller saved
    sessions                                       all sessions
    forget, update, check, load,
    gradients, weights                             as in experts/training/desk.py
    save       caller?                             makes the last step durable
    rebase                                         notes the versions that a session was published as, and the
                                                   id of the swap that publishes it, until it is over
    close                                          ends a session, and forgets what it has learned

Parts are [expert, version, start, stop, number]: pairs `start:stop` of `index`, grouped by expert. The answer has an
entry of `outcomes` for each: {"ok": True, ...}, {"error": ..., "message": ...}, or {"behind": True, "applied": ...,
"passes": ...} where the candidate is not where the message takes it to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...experts import errors
from ...experts.errors import ExpertFailed, ExpertMeshError

REPLICAS = ("first", "all")
"""Which replicas of an expert compute its training."""

OPEN_TO_READERS = ("versions", "forward", "backward")
"""The operations that a reader may ask for, without a session."""


@dataclass(frozen=True, kw_only=True)
class TrainAsked:
    """A request of training; `op` says which, and which other fields have a meaning."""

    op: str
    session: str = ""
    layer: str = ""
    experts: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    parts: list[list[Any]] = field(default_factory=list)
    step: int = 0
    durable: int = 0
    publishing: str = ""
    generation: int = 0
    seed: int = 0
    training: bool = True
    keep: bool = False
    of_rows: bool = True
    lr: float | None = None
    scale: float = 1.0
    optimizer: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    holder: str = ""
    replicas: str = "first"


def error_of(outcome: Mapping[str, Any]) -> ExpertMeshError:
    """The error that the outcome of a part tells of."""
    kind = getattr(errors, str(outcome.get("error")), None)
    message = str(outcome.get("message", "no reason was given"))
    return kind(message) if isinstance(kind, type) and issubclass(kind, ExpertMeshError) else ExpertFailed(message)
