"""Tunes a process of a cluster: memory returned to the system, garbage collection, priority of threads."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor


def give_memory_back() -> None:
    """Make the C library return large blocks to the system when they are freed, and cap the number of arenas.

    For processes that read weights in threads and are not latency-critical. M_MMAP_THRESHOLD is -3, M_ARENA_MAX -8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 128 * 1024)
        mallopt(-8, 2)


def trim_memory() -> None:
    """Make the C library return freed blocks to the system, such as those of rejected weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_go() -> None:
    """Run a full garbage collection, then `trim_memory`; for processes that are not latency-critical.

    An error and its frames reference each other, and keep rejected weights alive until the next full collection.
    """
    gc.collect()
    trim_memory()


def settle() -> None:
    """Exclude all objects that exist now from future garbage collections.

    The imports of torch and Ray create some hundred thousand objects that live as long as the process. A full
    collection visits each of them, and no request is answered for 130 to 270 ms (2 cores, 2026-11-25).
    """
    gc.collect()
    gc.freeze()


def take_turns_often() -> None:
    """Let threads that run Python take turns every 0.2 ms, in place of 5 ms.

    gRPC's asyncio layer takes four turns of its event loop to accept a call, and each may wait for the thread that has
    Python's lock. With one that is busy four fifths of the time, 1,500 calls a second were refused after 211 ms (p50),
    and after 2 to 27 ms with 0.2 ms (2 cores that others used too, 2026-11-27).
    """
    sys.setswitchinterval(0.0002)


def yield_to_serving() -> None:
    """Give this thread the lowest priority, so that staging does not slow down serving."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def background(name: str) -> ThreadPoolExecutor:
    """A pool of threads with the lowest priority, to read and hash weights that do not serve yet."""
    return ThreadPoolExecutor(4, thread_name_prefix=name, initializer=yield_to_serving)
