"""Checks the frame of a call and converts it to a request, and encodes a reply as buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...experts.errors import InvalidRequest, TooLarge
from ...experts.protocol import CallOptions, from_mapping
from ...experts.tensors import from_wire, to_wire
from ...experts.wire import Buffer, Frame, WireTensor, encode_parts
from ...router.request.answer import ForwardReply, ForwardRequest
from ..rpc.status import is_request_id

CALL_TENSORS = ("x", "gate_input", "top_k_index", "top_k_weights")


def forward_request(frame: Frame, request_id: str, timeout: float, client: str) -> ForwardRequest:
    """The router's request for a call frame, due within `timeout` seconds; the frame's own request id takes precedence.

    Raises InvalidRequest.
    """
    if frame.kind != "call":
        raise InvalidRequest(f"expected a call frame, not {frame.kind[:64]!r}")
    unknown = [name for name in frame.tensors if name not in CALL_TENSORS]
    if unknown or "x" not in frame.tensors:
        raise InvalidRequest(f"a call must hold the tensor x, and may hold {', '.join(CALL_TENSORS[1:])}")
    options = from_mapping(CallOptions, frame.meta)
    if options.request_id is None:
        options = replace(options, request_id=request_id)
    if not is_request_id(options.request_id):
        raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : / -")
    if not frame.tensors["x"].shape:
        raise InvalidRequest("x must have a first dimension, the rows")
    tensors = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
    return ForwardRequest(
        x=tensors["x"],
        options=options,
        timeout=timeout,
        features=tensors.get("gate_input"),
        indices=tensors.get("top_k_index"),
        weights=tensors.get("top_k_weights"),
        client=client,
    )


def reply_frame(reply: ForwardReply) -> Frame:
    """The frame of a reply, without `lost_mass` if nothing was lost. It shares the memory of the reply's tensors."""
    tensors: dict[str, Tensor | None] = {
        "output": reply.output,
        "lost_mass": reply.lost_mass if reply.summary.degraded else None,
        "indices": reply.indices,
        "weights": reply.weights,
    }
    wired: dict[str, WireTensor] = {name: to_wire(tensor) for name, tensor in tensors.items() if tensor is not None}
    return Frame("reply", dict(vars(reply.summary)), wired)


def reply_parts(reply: ForwardReply) -> list[Buffer]:
    """The buffers of a reply frame. No tensor is copied."""
    frame = reply_frame(reply)
    return encode_parts(frame.kind, frame.meta, frame.tensors)


def one_message(parts: Sequence[Buffer], max_message_bytes: int) -> bytes:
    """Join the buffers into one message. Raises TooLarge if they exceed `max_message_bytes`."""
    total = sum(len(part) for part in parts)
    if total > max_message_bytes:
        raise TooLarge(
            f"the reply has {total} bytes, but max_message_bytes of this cluster is {max_message_bytes}: call with "
            "stream=True, send fewer rows per call, or raise it on both the client and the cluster"
        )
    return b"".join(parts)
