"""From a call's frame to a request of the router: every option and tensor checked. No gRPC in here."""

from __future__ import annotations

from dataclasses import replace

from ..experts.errors import InvalidRequest
from ..experts.protocol import CallOptions, from_mapping
from ..experts.tensors import from_wire
from ..experts.wire import Frame
from ..router.answer import ForwardRequest
from .status_protocol import is_request_id

CALL_TENSORS = ("x", "gate_input", "top_k_index", "top_k_weights")


def forward_request(frame: Frame, request_id: str, timeout: float, client: str) -> ForwardRequest:
    """What a call asks of the router within `timeout` seconds; its own request id goes before the one that is given.

    Raises InvalidRequest.
    """
    if frame.kind != "call":
        raise InvalidRequest(f"a call frame was expected, not {frame.kind[:64]!r}")
    unknown = [name for name in frame.tensors if name not in CALL_TENSORS]
    if unknown or "x" not in frame.tensors:
        raise InvalidRequest(f"a call carries the tensor x, and of others only {', '.join(CALL_TENSORS[1:])}")
    options = from_mapping(CallOptions, frame.meta)
    if options.request_id is None:
        options = replace(options, request_id=request_id)
    if not is_request_id(options.request_id):
        raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : / -")
    if not frame.tensors["x"].shape:
        raise InvalidRequest("x must have a first dimension, its rows")
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
