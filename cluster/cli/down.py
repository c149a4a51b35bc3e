"""`expertmesh down`: stops a cluster on this machine, or removes the files of a dead one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import click

from ...experts.errors import DeadlineExceeded, NotFound, PermissionDenied
from ..machine.name_lock import lock_name
from ..machine.run_files import RunFile, find, list_all
from .connect import advising

_POLL = 0.05


@click.command()
@click.option("--name", show_default="the only one running, or `default`", help="Name of the cluster.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for the cluster to exit.")
def down(name: str | None, timeout: float) -> None:
    """Stop a cluster on this machine.

    The cluster refuses new requests, finishes those in flight and stops its actors. If the cluster has died, this
    removes the files it left behind. Exits with 1 if no cluster is running.

    \b
    Examples:
      expertmesh down
      expertmesh down --name staging --timeout 10
    """
    dead = _dead(name)
    if dead is not None:
        lock_name(dead.name).close()
        click.echo(f"cluster {dead.name} (pid {dead.pid}) had died; its files are removed")
        return
    cluster = _running(name)
    seconds = stop(cluster, timeout)
    click.echo(f"cluster {cluster.name} (pid {cluster.pid}) stopped after {seconds:.1f} s")


def stop(
    cluster: RunFile,
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Send SIGTERM to the process of a cluster and wait until it has exited; returns the seconds that took.

    Raises NotFound if it has exited already, PermissionDenied for another user's process, DeadlineExceeded.
    """
    if cluster.is_stale():
        raise NotFound(f"cluster {cluster.name!r} has stopped already")
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
                f"cluster {cluster.name!r} (pid {cluster.pid}) is still running after {timeout:g} s: wait longer with "
                f"--timeout, or kill it with `kill -9 {cluster.pid}` and run `expertmesh down --name {cluster.name}`"
            )
        sleep(_POLL)
    return clock() - start


def _dead(name: str | None) -> RunFile | None:
    """The dead cluster of that name; without a name the only one, if no cluster is running."""
    clusters = list_all()
    dead = [cluster for cluster in clusters if cluster.is_stale()]
    if name is not None:
        return next((cluster for cluster in dead if cluster.name == name), None)
    return dead[0] if len(dead) == len(clusters) == 1 else None


def _running(name: str | None) -> RunFile:
    """The running cluster to stop. Raises NotFound."""
    clusters = list_all()
    if not all(cluster.is_stale() for cluster in clusters):
        with advising():
            return find(name)
    dead = f"; `expertmesh down --name {clusters[0].name}` removes the files of a dead one" if clusters else ""
    which = "no cluster" if name is None else f"no cluster named {name!r}"
    raise NotFound(f"{which} is running, so there is nothing to stop{dead}")
