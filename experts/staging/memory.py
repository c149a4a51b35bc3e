"""Free memory of a device, and recovery when it runs out."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import TooLarge
from .machine_memory import memory_bytes

RESERVE = 1.2
"""A new version is built beside the old one only if this multiple of its size is free."""

Result = TypeVar("Result")


def check_memory(needed: int, device: str, *, free: Callable[[str], int | None] | None = None) -> None:
    """Check that `RESERVE` times `needed` bytes are free on a device. `free` replaces `free_memory`.

    Raises TooLarge that suggests a way out.
    """
    free_bytes = (free or free_memory)(device)
    if free_bytes is not None and free_bytes < RESERVE * needed:
        raise TooLarge(
            f"the new version has {needed} bytes, and {RESERVE} times that must be free on {device} beside the old "
            f"one, but only {free_bytes} bytes are: {_way_out(device)}"
        )


def within_memory(work: Callable[[], Result], device: str) -> Result:
    """Do work that allocates; if memory runs out, release everything that the work allocated.

    Raises TooLarge that suggests a way out if memory runs out; other errors propagate.
    """
    try:
        return work()
    except Exception as error:
        if not _ran_out(error):
            raise
        for link in _chain(error):
            traceback.clear_frames(link.__traceback__)
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    raise TooLarge(f"{device} ran out of memory while it held both versions: {_way_out(device)}")


def free_memory(device: str, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on a device; None if unknown.

    On the CPU it is the minimum over the machine and the control groups of this process; on a GPU it includes memory
    that torch has reserved but does not use.
    """
    place = torch.device(device)
    if place.type == "cuda":
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + unused
    if place.type != "cpu":
        return None
    return memory_bytes(root)[1]


def _way_out(device: str) -> str:
    if torch.device(device).type == "cuda":
        return 'stage it with mode="staged_cpu", or retire older versions of this expert first'
    return "retire older versions first, place fewer experts on this node, or raise its memory limit"


def _ran_out(error: BaseException) -> bool:
    """Whether out-of-memory is the cause; torch on the CPU reports it only in the message of a RuntimeError."""
    return any(
        isinstance(link, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(link, RuntimeError) and "allocate memory" in str(link))
        for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
