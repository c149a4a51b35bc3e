"""What a process of a cluster does about itself: memory that it gives back, garbage that it looks for, priority."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor


def give_memory_back() -> None:
    """Have the C library return large blocks when they are freed, and not keep them for each thread that used some.

    For a process that reads weights in threads and is never in a hurry. M_MMAP_THRESHOLD is -3, M_ARENA_MAX -8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 128 * 1024)
        mallopt(-8, 2)


def trim_memory() -> None:
    """Have the C library return what it has kept of freed blocks, as of weights that were refused."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_go() -> None:
    """Like `trim_memory`, and before it collect what is only held by itself, in a process that is never in a hurry.

    The frames of an error keep the weights that were refused, and it keeps the frames, until the next full collection.
    """
    gc.collect()
    trim_memory()


def settle() -> None:
    """Have the garbage collector never look again at what is there by now.

    After the imports of torch and Ray these are some hundred thousand objects that live as long as the process: a full
    collection looks at each, and nothing is answered for 130 to 270 ms (2 cores, 2026-11-25).
    """
    gc.collect()
    gc.freeze()


def yield_to_serving() -> None:
    """Give this thread the lowest priority, so that staging does not slow down what serves."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def background(name: str) -> ThreadPoolExecutor:
    """Threads of the lowest priority, for reading and hashing weights that do not serve yet."""
    return ThreadPoolExecutor(4, thread_name_prefix=name, initializer=yield_to_serving)
