"""`expertmesh serve`: starts a cluster from a YAML file and keeps it running."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click

from ..config.cluster_config import ClusterConfig
from ..config.loader import load_config, parse_override
from ..machine.run_files import token_path
from ..owner.cluster import Cluster


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the cluster; several may run on one machine.")
@click.option("--host", help="Address to listen on; anything but loopback needs TLS.")
@click.option("--port", type=int, help="Port to listen on; 0 takes any free one.")
@click.option("--metrics-port", type=int, help="Port of the Prometheus metrics; 0 takes any free one.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other value of the file; repeatable.")
def serve(
    mesh: Path,
    name: str | None,
    host: str | None,
    port: int | None,
    metrics_port: int | None,
    settings: tuple[str, ...],
) -> None:
    """Start the cluster that a YAML file describes, and run until Ctrl-C or `expertmesh down`.

    The command line wins over EXPERTMESH_* in the environment (EXPERTMESH_PORT=50052), which wins over the file. The
    file names code that is run, so it must be yours and nobody else may write it.

    \b
    layers:
      waves:
        gate: {type: fixed, weights: [0.5, 0.5]}
        experts:
          sin: {factory: "torch:sin"}
          cos: {factory: "torch:cos"}

    \b
    expertmesh serve mesh.yaml
    expertmesh serve mesh.yaml --port 0 --set layers.waves.experts.sin.replicas=2
    """
    given = {"name": name, "host": host, "port": port, "metrics_port": metrics_port}
    overrides = dict(map(parse_override, settings))
    overrides.update((key, value) for key, value in given.items() if value is not None)
    config = load_config(mesh, overrides)
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Cluster.start(config=config, progress=interrupt.checked(_say)) as cluster:
            interrupt.check()
            _print_ready(config, cluster)
            cluster.wait()
            _say("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """Ctrl-C and SIGTERM while a cluster starts: raised where they come, and once more at the start's next step.

    The second time is for those that came where somebody swallows them, as Ray does in places.
    """

    def __init__(self) -> None:
        self._unheard = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals. Raises KeyboardInterrupt."""
        self._unheard = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt, once, if a signal came before."""
        if self._unheard:
            self._unheard = False
            raise KeyboardInterrupt

    def checked(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Say what the start does next, unless it is to end."""

        def told(message: str) -> None:
            self.check()
            say(message)

        return told


def _say(message: str) -> None:
    click.echo(message, err=True)


def _print_ready(config: ClusterConfig, cluster: Cluster) -> None:
    click.echo(f"cluster {config.name} is ready")
    click.echo(f"  endpoint  {cluster.endpoint}")
    if cluster.metrics_endpoint:
        click.echo(f"  metrics   {cluster.metrics_endpoint}")
    click.echo(f"  tokens    {token_path(config.name)} (clients of this user find it)")
    click.echo(f'  call it   Client("{cluster.endpoint}").forward("{config.layers[0].name}", rows)')
    click.echo(f"  stop it   Ctrl-C, or expertmesh down --name {config.name}")
