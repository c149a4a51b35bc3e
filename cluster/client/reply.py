"""The reply to a call: the output, and the versions that computed it.

Shapes: T rows, K experts a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...experts.errors import DataLoss
from ...experts.protocol import CallSummary
from ...experts.wire import Frame, WireTensor
from ..rpc.swaps import read_answer
from .arrays import ArrayKind


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """The output of a layer and its metadata. The arrays have the caller's type, are writable, and own their memory.

    `output` is [T, ...]; `lost_mass` is float32 [T], the share of each row's |gate weight| whose expert gave no answer,
    and `max_lost_mass` its maximum. `versions` has the version of the gate and of every expert that took part; `epoch`
    is an epoch of `cluster`. `degraded` is true if any expert is `missing`. `dropped` counts (row, expert) pairs beyond
    capacity. `indices` [T, K] and `weights` [T, K] are None unless the call set `return_routing=True`.

    Example:
        reply = client.call("news", x)
        print(reply.output, reply.versions)
        if reply.degraded:
            print(reply.missing, reply.max_lost_mass)
    """

    output: Any = field(repr=False)
    epoch: int
    versions: dict[str, str]
    degraded: bool
    missing: list[str]
    lost_mass: Any = field(repr=False)
    max_lost_mass: float
    request_id: str
    dropped: int
    cluster: str = field(default="", repr=False)
    indices: Any = field(default=None, repr=False)
    weights: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        lost = f", missing={self.missing[:8]!r}, max_lost_mass={self.max_lost_mass:g}" if self.degraded else ""
        output = f"{type(self.output).__name__}{list(self.output.shape)} {self.output.dtype}"
        return (
            f"Reply(output={output}, epoch={self.epoch}, versions={{{len(self.versions)} versions}}, "
            f"degraded={self.degraded}{lost}, request_id={self.request_id!r})"
        )


def read_reply(frame: Frame, *, rows: int, kind: ArrayKind) -> Reply:
    """Check a reply frame for a call of `rows` rows, and convert its tensors to the caller's array type.

    Raises DataLoss for any other frame.
    """
    if frame.kind != "reply":
        raise DataLoss(f"expected a reply frame, but the server sent a {frame.kind[:64]!r} frame")
    summary = read_answer(CallSummary, frame.meta)
    output = _tensor(frame, "output", rows)
    lost_mass = _optional(frame, "lost_mass", rows, kind)
    fields = vars(summary) | {"max_lost_mass": float(summary.max_lost_mass)}
    routing = {name: _optional(frame, name, rows, kind) for name in ("indices", "weights")}
    lost_mass = kind.zeros(rows) if lost_mass is None else lost_mass
    return Reply(output=kind.restore(output), lost_mass=lost_mass, **fields, **routing)


def _optional(frame: Frame, name: str, rows: int, kind: ArrayKind) -> Any:
    return kind.restore(_tensor(frame, name, rows)) if name in frame.tensors else None


def _tensor(frame: Frame, name: str, rows: int) -> WireTensor:
    tensor = frame.tensors.get(name)
    if tensor is None:
        raise DataLoss(f"the reply has no tensor {name!r}")
    if not tensor.shape or tensor.shape[0] != rows:
        raise DataLoss(f"{name!r} in the reply has shape {list(tensor.shape)}, but {rows} rows were sent")
    return tensor
