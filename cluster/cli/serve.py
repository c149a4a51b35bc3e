"""`expertmesh serve`: starts a cluster from a YAML file and keeps it running."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click

from ...experts.errors import FailedPrecondition
from ..config.cluster_config import ClusterConfig
from ..config.loader import load_config, parse_override
from ..machine.run_files import list_all, token_path
from ..owner.cluster import Cluster


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path))
@click.option(
    "--name",
    show_default="that in MESH, or `default`",
    help="Name of the cluster, to tell several on one machine apart.",
)
@click.option(
    "--host", show_default="that in MESH, or 127.0.0.1", help="Address to listen on; any but loopback needs TLS."
)
@click.option("--port", type=int, show_default="that in MESH, or 50051", help="Port to listen on; 0 picks a free one.")
@click.option(
    "--metrics-port",
    type=int,
    show_default="that in MESH, or 0",
    help="Port of the Prometheus metrics; 0 picks a free one.",
)
@click.option(
    "--routers",
    type=int,
    show_default="that in MESH, or 1",
    help="Number of routers, each with the next port and metrics port.",
)
@click.option(
    "--redeclare",
    multiple=True,
    metavar="ID",
    help="Replace the version of ID that was swapped in, and its number of replicas, by what MESH declares; "
    "repeatable. Without it, swapped versions serve on after a restart.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override any key of the file; repeatable.")
def serve(
    mesh: Path,
    name: str | None,
    host: str | None,
    port: int | None,
    metrics_port: int | None,
    routers: int | None,
    redeclare: tuple[str, ...],
    settings: tuple[str, ...],
) -> None:
    """Start the cluster described by the YAML file MESH, and run until Ctrl-C or `expertmesh down`.

    Options override environment variables (EXPERTMESH_PORT=50052), which override the file. The file names code that
    the cluster runs, so only you or root may own it and only its owner may write to it.

    \b
    A mesh.yaml:
      layers:
        waves:
          gate: {type: fixed, weights: [0.5, 0.5]}
          experts:
            sin: {factory: "torch:sin"}
            cos: {factory: "torch:cos"}

    \b
    Examples:
      expertmesh serve mesh.yaml
      expertmesh serve mesh.yaml --port 0 --set layers.waves.experts.sin.replicas=2
      expertmesh serve mesh.yaml --port 50051 --routers 2
      expertmesh serve mesh.yaml --redeclare waves/sin
    """
    options = {"name": name, "host": host, "port": port, "metrics_port": metrics_port, "routers": routers}
    overrides = dict(map(parse_override, settings))
    overrides.update((key, value) for key, value in options.items() if value is not None)
    config = load_config(mesh, overrides)
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        progress = interrupt.checked(_print_progress)
        with _started(config, progress, redeclare) as cluster:
            interrupt.check()
            _print_ready(config, cluster)
            cluster.wait()
            _print_progress("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(config: ClusterConfig, progress: Callable[[str], None], redeclare: tuple[str, ...]) -> Cluster:
    try:
        return Cluster.start(config=config, name=config.name, progress=progress, redeclare=redeclare)
    except FailedPrecondition as error:
        if all(run.name != config.name or run.is_stale() for run in list_all()):
            raise
        advice = f"`expertmesh down --name {config.name}` stops it, --name chooses another"
        raise FailedPrecondition(f"{error.message} ({advice})") from None


class Interrupt:
    """Turns SIGINT and SIGTERM during a start into KeyboardInterrupt, at once and again at the next step of the start.

    The second one covers signals that arrive inside code that swallows the exception, as Ray does in places.
    """

    def __init__(self) -> None:
        self._pending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Raises KeyboardInterrupt."""
        self._pending = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived since the last check."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def checked(self, progress: Callable[[str], None]) -> Callable[[str], None]:
        """Wrap a progress callback so that each call checks for a signal first."""

        def checked_progress(message: str) -> None:
            self.check()
            progress(message)

        return checked_progress


def _print_progress(message: str) -> None:
    click.echo(message, err=True)


def _print_ready(config: ClusterConfig, cluster: Cluster) -> None:
    click.echo(f"cluster {config.name} is ready")
    for endpoint in cluster.endpoints:
        click.echo(f"  endpoint  {endpoint}")
    for page in cluster.metrics_endpoints:
        click.echo(f"  metrics   {page}")
    click.echo(f"  tokens    {token_path(config.name)} (clients of this user find them)")
    called = repr(cluster.endpoints) if len(cluster.endpoints) > 1 else f'"{cluster.endpoint}"'
    click.echo(f'  call it   Client({called}).forward("{config.layers[0].name}", rows)')
    click.echo(f"  stop it   Ctrl-C, or expertmesh down --name {config.name}")
