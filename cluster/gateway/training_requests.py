"""Requests of training, checked; and the frames that answer them. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import InvalidRequest
from ...experts.protocol import TrainReply
from ...experts.tensors import to_wire
from ...experts.wire import Frame
from ...router.epochs.epochs import Epoch
from ...router.mixture.layer import Layer
from ...router.training.exchange import Part
from ...router.training.passes import Share, wide
from ..rpc.training import TrainAsked, error_of
from ..state.training_sessions import SessionRecord

Outcome = dict[str, Any]
MOST_PARTS = 4096
MOST_CHOICES = 4
"""How often a row may choose one expert: more would make much work, and memory, of few bytes."""


def parts_of(asked: TrainAsked, record: SessionRecord | None, current: Mapping[str, str] | None) -> list[Part]:
    """The parts that are asked for, checked: experts of the session, or of the layer, with its current versions."""
    known = record.experts if record is not None else dict(current or {})
    parts: list[Part] = []
    if not 0 < len(asked.parts) <= MOST_PARTS:
        raise InvalidRequest(f"a message of training must have 1 to {MOST_PARTS} parts")
    for part in asked.parts:
        if tuple(map(type, part)) != (str, str, int, int, int):
            raise InvalidRequest("a part is [expert, version, start, stop, number]")
        expert, version, start, stop, number = part
        if expert not in known:
            where = "the session" if record is not None else f"layer {asked.layer}"
            raise InvalidRequest(f"{expert[:64]!r} is no expert of {where}; those are {', '.join(sorted(known)[:20])}")
        parts.append((expert, (version if record is None else "") or known[expert], start, stop, number))
    if len({part[0] for part in parts}) < len(parts):
        raise InvalidRequest("an expert must have one part")
    return parts


def check_pass(parts: Sequence[Part], rows_T: Tensor, index_N: Tensor, weights_N: Tensor | None) -> None:
    """Check the tensors of a pass against its parts. Raises InvalidRequest."""
    if not rows_T.ndim:
        raise InvalidRequest("rows must have a first dimension")
    if index_N.dtype != torch.int64 or index_N.ndim != 1:
        raise InvalidRequest("index must be int64 [N]")
    if len(index_N) and not 0 <= int(index_N.min()) <= int(index_N.max()) < len(rows_T):
        raise InvalidRequest(f"index points outside the {len(rows_T)} rows")
    if weights_N is not None and weights_N.shape != index_N.shape:
        raise InvalidRequest(f"there must be one weight for each of {len(index_N)} pairs, not {list(weights_N.shape)}")
    if any(stop - start > MOST_CHOICES * len(rows_T) for _, _, start, stop, _ in parts):
        raise InvalidRequest(f"an expert may be chosen at most {MOST_CHOICES} times by a row, on average")
    if any(not 0 <= start < stop <= len(index_N) for _, _, start, stop, _ in parts):
        raise InvalidRequest("a part must have pairs, within those of the index")


def added(answered: Sequence[tuple[Share, TrainReply]], rows_T: Tensor, index_N: Tensor) -> dict[str, Tensor]:
    """The gradients of all rows and weights, from those of shares: by row, or by pair and added up in their order."""
    kind = wide(rows_T.dtype)
    by_weight = torch.zeros(len(index_N), dtype=kind)
    rows = torch.zeros(rows_T.shape, dtype=kind) if rows_T.is_floating_point() else None
    pairs: Tensor | None = None
    for share, reply in answered:
        if "weights" in reply.tensors:
            by_weight[share.pairs_N] = reply.tensors["weights"].to(kind)
        if rows is not None and "rows" in reply.tensors:
            rows.index_add_(0, share.rows_R, reply.tensors["rows"].to(kind))
        if rows is not None and "pairs" in reply.tensors:
            pairs = torch.zeros((len(index_N), *rows_T.shape[1:]), dtype=kind) if pairs is None else pairs
            pairs[share.pairs_N] = reply.tensors["pairs"].to(kind)
    if rows is not None and pairs is not None:
        rows.index_add_(0, index_N, pairs)
    return {"weights": by_weight} if rows is None else {"weights": by_weight, "rows": rows}


def needed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of a name. Raises InvalidRequest."""
    if name not in tensors:
        raise InvalidRequest(f"the tensor {name!r} is missing")
    return tensors[name]


def raise_first(outcomes: Sequence[Outcome]) -> None:
    """Raise the error of the first part that failed."""
    for outcome in outcomes:
        if "error" in outcome:
            raise error_of(outcome)


def frame_of(meta: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Frame:
    """A frame that answers."""
    return Frame("train", meta, {name: to_wire(tensor) for name, tensor in (tensors or {}).items()})


def layer_frame(layer: Layer, epoch: Epoch) -> Frame:
    """What a client needs to know of a layer to train it: its experts in the order of the gate, and their versions."""
    ids = (layer.gate_id, *layer.everyone_by_id)
    return frame_of(
        {
            "epoch": epoch.number, "versions": {id: epoch.versions[id] for id in ids},
            "experts": list(layer.expert_ids), "shared": list(layer.shared_ids), "combine": layer.combine,
            "on_dropped": layer.on_dropped, "capacity": {} if layer.capacity is None else asdict(layer.capacity),
        }
    )  # fmt: skip
