"""The frame of an answer, as buffers that a stream sends one by one, or joined where one message holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from ..experts.errors import TooLarge
from ..experts.tensors import to_wire
from ..experts.wire import WireTensor, encode_parts
from ..router.answer import ForwardReply
from .stream_protocol import Buffer


def reply_parts(reply: ForwardReply) -> list[Buffer]:
    """The buffers of an answer's frame; `lost_mass` is left out where nothing was lost. No tensor is copied."""
    tensors: dict[str, Tensor | None] = {
        "output": reply.output,
        "lost_mass": reply.lost_mass if reply.summary.degraded else None,
        "indices": reply.indices,
        "weights": reply.weights,
    }
    wired: dict[str, WireTensor] = {name: to_wire(tensor) for name, tensor in tensors.items() if tensor is not None}
    return encode_parts("reply", asdict(reply.summary), wired)


def one_message(parts: Sequence[Buffer], max_message_bytes: int) -> bytes:
    """The buffers as one message. Raises TooLarge where they do not fit into one."""
    total = sum(len(part) for part in parts)
    if total > max_message_bytes:
        raise TooLarge(
            f"the reply has {total} bytes, max_message_bytes of this cluster is {max_message_bytes}: call with "
            "stream=True, send fewer rows at a time, or raise it at both ends"
        )
    return b"".join(parts)
