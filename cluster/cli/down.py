"""`expertmesh down`: stops a cluster of this machine, or clears what a dead one left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import click

from ...experts.errors import DeadlineExceeded, NotFound, PermissionDenied
from ..machine.name_lock import lock_name
from ..machine.run_files import RunFile, find, list_all

_POLL = 0.05


@click.command()
@click.option("--name", help="The cluster; by default the only one that runs, or `default`.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for its end.")
def down(name: str | None, timeout: float) -> None:
    """Stop a cluster that runs on this machine.

    It stops taking requests, answers those it has, and ends its actors. For a cluster that died, this clears what it
    left behind.

    \b
    expertmesh down
    expertmesh down --name staging --timeout 10
    """
    dead = _dead(name)
    if dead is not None:
        lock_name(dead.name).close()
        click.echo(f"cluster {dead.name} (pid {dead.pid}) had died; what it left is cleared")
        return
    cluster = find(name)
    seconds = stop(cluster, timeout)
    click.echo(f"cluster {cluster.name} (pid {cluster.pid}) has stopped after {seconds:.1f} s")


def stop(
    cluster: RunFile,
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Ask the process of a cluster to stop, and wait for its end; returns the seconds that it took.

    Raises NotFound if it is gone already, PermissionDenied for another user's process, DeadlineExceeded.
    """
    if cluster.is_stale():
        raise NotFound(f"cluster {cluster.name!r} is gone already")
    try:
        os.kill(cluster.pid, signal.SIGTERM)
    except ProcessLookupError:
        return 0.0
    except PermissionError:
        raise PermissionDenied(f"cluster {cluster.name!r} (pid {cluster.pid}) belongs to another user") from None
    start = clock()
    while not cluster.is_stale():
        if clock() - start >= timeout:
            raise DeadlineExceeded(
                f"cluster {cluster.name!r} (pid {cluster.pid}) still runs after {timeout:g} s: wait longer with "
                f"--timeout, or end it with `kill -9 {cluster.pid}` and run `expertmesh down --name {cluster.name}`"
            )
        sleep(_POLL)
    return clock() - start


def _dead(name: str | None) -> RunFile | None:
    """The dead cluster that is meant: that of the name, or the only one where nothing runs."""
    stale = [found for found in list_all() if found.is_stale()]
    if name is not None:
        return next((found for found in stale if found.name == name), None)
    return stale[0] if len(stale) == 1 and len(list_all()) == 1 else None
