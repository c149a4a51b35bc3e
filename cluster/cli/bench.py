"""`expertmesh bench`: sends load to a running cluster and reports latency, throughput and failures."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from ...experts.errors import MissingExtra, Unavailable
from ...experts.wire import ITEM_SIZES
from ..bench.load import MOST_IN_FLIGHT, LoadClient, LoadSettings
from ..bench.report import Report
from ..bench.schedule import ARRIVALS
from ..bench.session import Bench, BenchResult
from ..bench.target import MeshFile, Target, check_running, read_mesh, targets
from ..client.client import Client
from ..client.routers.endpoint import resolve
from ..machine.process_tuning import settle
from ..machine.tokens import read_token
from .bench_view import LoadView, print_report, search_line, step_line
from .connect import check_one, cluster_options, endpoints
from .output import output_option, print_json

STATUS_SECONDS = 10.0
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
ABOVE_0 = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path), required=False)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    show_default="all layers, in equal shares",
    help="Send to this layer; repeatable.",
)
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Rows in each request.")
@click.option(
    "--rate", type=ABOVE_0, default=50.0, show_default=True, help="Requests/s; with --saturate, of the first step."
)
@click.option("--saturate", is_flag=True, help="Search for the highest sustained rate, in steps of --duration seconds.")
@click.option(
    "--slo-ms",
    type=ABOVE_0,
    help="Latency target in ms: slower answers do not count as goodput, and a rate is sustained only if p99 meets it.",
)
@click.option(
    "--arrivals",
    type=click.Choice(ARRIVALS),
    default="poisson",
    show_default=True,
    help="Gaps between requests: exponential (poisson) or equal (uniform).",
)
@click.option("--duration", type=ABOVE_0, default=10.0, show_default=True, help="Seconds to measure.")
@click.option(
    "--warmup",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Seconds of load before the measurement starts.",
)
@click.option("--connections", type=click.IntRange(1, 256), default=4, show_default=True, help="gRPC connections.")
@click.option("--timeout", type=ABOVE_0, default=10.0, show_default=True, help="Deadline of each request, in seconds.")
@click.option(
    "--max-in-flight",
    type=click.IntRange(1),
    default=MOST_IN_FLIGHT,
    show_default=True,
    help="Limit of requests in flight; requests beyond it are dropped and count as failed.",
)
@click.option("--width", type=click.IntRange(1), help="Width of the rows, for a layer that declares no input shape.")
@click.option(
    "--dtype",
    type=click.Choice(list(ITEM_SIZES)),
    show_default="that of the layer, or float32",
    help="Dtype of the rows.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the arrival times and the rows."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Plot latency and rows/s to this .png, .svg or .pdf file; needs matplotlib.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    show_default="EXPERTMESH_TOKEN, or the token of your cluster on this machine",
    help="File with the token.",
)
@cluster_options
@output_option
def bench(
    mesh: Path | None,
    layers: tuple[str, ...],
    saturate: bool,
    slo_ms: float | None,
    connections: int,
    width: int | None,
    dtype: str | None,
    plot: Path | None,
    token_file: Path | None,
    name: str | None,
    endpoint: str | None,
    ca_cert: Path | None,
    output: str,
    **load: Any,
) -> None:
    """Send load to a running cluster, and report latency, throughput and failures.

    MESH is the file passed to `expertmesh serve`; it names the cluster and its layers. Without MESH, the command finds
    your cluster as `expertmesh status` does. Rows are random. Requests follow a fixed schedule (an open loop): a slow
    answer does not delay the next request, and latency counts from the time a request was due. Ctrl-C stops the load
    early and still prints the report.

    \b
    Examples:
      expertmesh bench mesh.yaml
      expertmesh bench mesh.yaml --layer news --rows 32 --rate 200 --duration 30
      expertmesh bench mesh.yaml --saturate --slo-ms 50
      expertmesh bench mesh.yaml --rate 200 --plot load.png
      expertmesh bench mesh.yaml -o json | jq '.report.all.latency_ms.p99'
      expertmesh bench --endpoint mesh.example.org:50051 --ca-cert ca.pem --token-file tokens --layer news --width 1024
    """
    check_one(name, endpoint)
    plotter = None if plot is None else load_plotter(plot)
    file = None if mesh is None else read_mesh(mesh)
    if file is not None and mesh is not None and endpoint is None:
        check_running(name or file.name, mesh, name)
        file = MeshFile(name=name or file.name, layers=file.layers)
        name = file.name
    token = None if token_file is None else read_token(token_file)
    routers = endpoints(endpoint)
    resolve(routers, token=token, name=name, ca_cert=ca_cert, token_option="--token-file")  # its errors name options
    connect = partial(LoadClient, routers, name=name, token=token, ca_cert=ca_cert)
    status = look(Client(routers, name=name, token=token, ca_cert=ca_cert, timeout=STATUS_SECONDS))
    aims = targets(layers, status, file, width=width, dtype=dtype)
    settings = LoadSettings(seconds=load.pop("duration"), most_in_flight=load.pop("max_in_flight"), **load)
    job = Bench(connect=connect, connections=connections, targets=aims, settings=settings, slo_ms=slo_ms)
    with LoadView(quiet=output == "json") as view:

        def on_step(rate: float, report: Report, reason: str | None) -> None:
            view.print(step_line(rate, report, reason))

        settle()  # keeps garbage collection in this process out of the measured latency
        result = asyncio.run(job.run(search=saturate, watch=view.show, on_step=on_step))
    title = f"cluster {status.get('name')}, {', '.join(aim.layer for aim in aims)}: {settings.rows} rows per request"
    show(result, document(result, status, job), output, title)
    if plotter is not None and plot is not None:
        draw(plotter, result, plot, title)
    check_answered(result.report, aims)


def look(client: Client) -> dict[str, Any]:
    """The status of the client's cluster; closes the client. Raises what a client raises."""
    with client:
        try:
            return client.status()
        except Unavailable as error:
            raise Unavailable(f"no cluster answers at {', '.join(client.endpoints)}: {error.message}") from None


def load_plotter(path: Path) -> ModuleType:
    """Import `bench/plot.py`. Raises MissingExtra without matplotlib, and UsageError if it cannot write to `path`."""
    if path.suffix.lower() not in PLOT_SUFFIXES or not path.absolute().parent.is_dir():
        raise click.UsageError(f"--plot needs a file in an existing folder, ending in {', '.join(PLOT_SUFFIXES)}")
    try:
        return import_module("..bench.plot", __package__)
    except ModuleNotFoundError as error:
        missing = (error.name or "matplotlib").partition(".")[0]
        raise MissingExtra(
            f"--plot needs {missing}, which is not installed; fix it with: pip install {missing}"
        ) from None


def document(result: BenchResult, status: dict[str, Any], job: Bench) -> dict[str, Any]:
    """The report as a JSON document."""
    aims = {aim.layer: {"shape": list(aim.shape), "dtype": aim.dtype} for aim in job.targets}
    settings = asdict(job.settings) | {"connections": job.connections, "slo_ms": job.slo_ms}
    report = {"cluster": status.get("name"), "layers": aims, "settings": settings, "report": asdict(result.report)}
    if result.search is None:
        return report
    steps = [{"rate": rate, **asdict(step.all)} for rate, step in result.steps]
    search = {"best": result.search.best, "worst": result.search.worst, "limit": result.search.limit}
    return report | {"search": search | {"interrupted": result.interrupted, "steps": steps}}


def show(result: BenchResult, report: dict[str, Any], output: str, title: str) -> None:
    """Print a result, as tables or as its JSON document."""
    if output == "json":
        print_json(report)
        return
    click.echo(title)
    if result.search is not None:
        click.echo(search_line(result.search, interrupted=result.interrupted))
    print_report(result.report)


def draw(plotter: ModuleType, result: BenchResult, path: Path, title: str) -> None:
    """Plot a result to a file."""
    if result.search is None:
        plotter.plot_seconds(result.report, path, title)
    else:
        plotter.plot_rates(result.steps, path, title)
    click.echo(f"plot saved to {path}", err=True)


def check_answered(report: Report, aims: tuple[Target, ...]) -> None:
    """Raise Unavailable if no request was answered OK."""
    if report.all.ok:
        return
    which = f"{report.all.due:,} requests to {', '.join(aim.layer for aim in aims)}"
    if not report.all.due:
        raise Unavailable("nothing was measured: no request was due, so give a longer --duration or a higher --rate")
    reasons = "; ".join(f"{code} {count:,} times" for code, count in report.all.failed.items())
    first = next(iter(report.errors.values()), "")
    raise Unavailable(f"none of {which} was answered OK: {reasons}{f', the first: {first}' if first else ''}")
