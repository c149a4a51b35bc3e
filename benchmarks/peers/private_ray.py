"""A Ray of our own, in a folder of its own, of which nothing is left: what all Ray arms of a process stand on."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from expertmesh.cluster.machine.temp_folder import new_run_folder
from expertmesh.cluster.runtime.ray_reaper import end_marked_processes, marked, start_reaper

from .arm import ArmUnavailable

TRIES = 2


@contextmanager
def private_ray() -> Iterator[Any]:
    """The `ray` module with a private Ray running; one that runs in this process already is reused, and left alone.

    At the end all of its processes are gone, and its folder too; a reaper sees to that if this process is killed.
    Raises ArmUnavailable where it does not start, also not at the second try.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: everything else would go before its actors
    import ray  # here, because importing it reads the environment

    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as running:
        for attempt in range(TRIES):
            try:
                running.enter_context(_running(ray))
                break
            except Exception as error:
                if attempt + 1 == TRIES:  # on a busy machine its processes may take longer than it waits for them
                    raise ArmUnavailable(f"Ray did not start: {error}") from error
        yield ray


@contextmanager
def _running(ray: Any) -> Iterator[None]:
    run = new_run_folder()
    folder = str(run / "ray")
    reaper = start_reaper(folder)
    try:
        with marked(folder):
            ray.init(
                address="local",  # without it, a Ray that runs on this machine would be joined
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        yield
    finally:
        ray.shutdown()
        end_marked_processes(folder)
        shutil.rmtree(run, ignore_errors=True)
        reaper.communicate()
