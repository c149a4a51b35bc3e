"""`expertmesh bench`: puts a load on a running cluster and reports what came of it."""

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
from ..bench.session import Bench, Found
from ..bench.target import MeshFile, Target, check_running, read_mesh, targets
from ..client.client import Client
from ..client.endpoint import resolve
from ..machine.process_tuning import settle
from ..machine.tokens import read_token
from .bench_view import LoadView, found_line, print_report, step_line
from .connect import check_one, cluster_options
from .output import output_option, print_json

STATUS_SECONDS = 10.0
PICTURES = (".png", ".svg", ".pdf")
ABOVE_0 = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("mesh", type=click.Path(path_type=Path), required=False)
@click.option("--layer", "layers", multiple=True, help="Only this layer; repeatable. By default all, evenly.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Rows of each request.")
@click.option("--rate", type=ABOVE_0, default=50.0, show_default=True, help="Requests/s; with --saturate the first.")
@click.option("--saturate", is_flag=True, help="Search for the highest rate that is borne; --duration is of each step.")
@click.option("--slo-ms", type=ABOVE_0, help="Answers later than this are no goodput; for --saturate p99 must keep it.")
@click.option(
    "--arrivals", type=click.Choice(ARRIVALS), default="poisson", show_default=True, help="Gaps between them."
)
@click.option("--duration", type=ABOVE_0, default=10.0, show_default=True, help="Seconds that are measured.")
@click.option(
    "--warmup", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds before, not measured."
)
@click.option("--connections", type=click.IntRange(1, 256), default=4, show_default=True, help="Connections to use.")
@click.option("--timeout", type=ABOVE_0, default=10.0, show_default=True, help="Seconds until a request has failed.")
@click.option(
    "--max-in-flight", type=click.IntRange(1), default=MOST_IN_FLIGHT, show_default=True, help="A safety cap."
)
@click.option("--width", type=click.IntRange(1), help="Width of the rows, where the layer does not declare it.")
@click.option("--dtype", type=click.Choice(list(ITEM_SIZES)), help="Their dtype; by default as declared, or float32.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of arrivals and rows.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw latency and rows/s into this file.")
@click.option("--token-file", type=click.Path(path_type=Path), help="By default EXPERTMESH_TOKEN, or found.")
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
    """Put a load on a running cluster, and report latency, throughput and failures.

    MESH is the file that `expertmesh serve` was given: it says which cluster and which layers. Without it, a cluster of
    yours is found as `expertmesh status` finds it. Rows are random. Requests go out when they are due, never later
    because earlier ones are slow, and their latency counts from then. Ctrl-C ends early and still reports.

    \b
    expertmesh bench mesh.yaml
    expertmesh bench mesh.yaml --layer news --rows 32 --rate 200 --duration 30
    expertmesh bench mesh.yaml --saturate --slo-ms 50
    expertmesh bench mesh.yaml --rate 200 --plot load.png
    expertmesh bench mesh.yaml -o json | jq '.report.all.latency_ms.p99'
    expertmesh bench --endpoint mesh.example.org:50051 --ca-cert ca.pem --token-file tokens --layer news --width 1024
    """
    check_one(name, endpoint)
    drawing = None if plot is None else plotting(plot)
    file = None if mesh is None else read_mesh(mesh)
    if file is not None and mesh is not None and endpoint is None:
        file, given = MeshFile(name=name or file.name, layers=file.layers), name
        check_running(file.name, mesh, given)
        name = file.name
    token = None if token_file is None else read_token(token_file)
    there = resolve(endpoint, token=token, name=name, ca_cert=ca_cert, token_option="--token-file")
    connect = partial(LoadClient, there.address, token=there.token, ca_cert=ca_cert)
    status = look(Client(there.address, token=there.token, ca_cert=ca_cert, timeout=STATUS_SECONDS))
    aims = targets(layers, status, file, width=width, dtype=dtype)
    settings = LoadSettings(seconds=load.pop("duration"), most_in_flight=load.pop("max_in_flight"), **load)
    job = Bench(connect=connect, connections=connections, targets=aims, settings=settings, slo_ms=slo_ms)
    with LoadView(quiet=output == "json") as view:

        def tell(rate: float, report: Report, refusal: str | None) -> None:
            view.say(step_line(rate, report, refusal))

        settle()  # the pauses of this process are not the cluster's
        found = asyncio.run(job.run(search=saturate, watch=view.show, tell=tell))
    title = f"cluster {status.get('name')}, {', '.join(aim.layer for aim in aims)}: {settings.rows} rows a request"
    show(found, document(found, status, job), output, title)
    if drawing is not None and plot is not None:
        draw(drawing, found, plot, title)
    check_answered(found.report, aims)


def look(client: Client) -> dict[str, Any]:
    """The status of the cluster that a client is of; closes the client. Raises what a client raises."""
    with client:
        try:
            return client.status()
        except Unavailable as error:
            raise Unavailable(f"no cluster answers at {client.endpoint}: {error.message}") from None


def plotting(path: Path) -> ModuleType:
    """What draws. Raises MissingExtra without matplotlib, and UsageError where no file can come to be at `path`."""
    if path.suffix.lower() not in PICTURES or not path.absolute().parent.is_dir():
        raise click.UsageError(f"--plot needs a file in a folder that is there, ending in {', '.join(PICTURES)}")
    try:
        return import_module("..bench.plot", __package__)
    except ModuleNotFoundError as error:
        missing = (error.name or "matplotlib").partition(".")[0]
        raise MissingExtra(
            f"--plot needs {missing}, which is not installed; mend it with: pip install {missing}"
        ) from None


def document(found: Found, status: dict[str, Any], job: Bench) -> dict[str, Any]:
    """The report for machines."""
    aims = {aim.layer: {"shape": list(aim.shape), "dtype": aim.dtype} for aim in job.targets}
    settings = asdict(job.settings) | {"connections": job.connections, "slo_ms": job.slo_ms}
    made = {"cluster": status.get("name"), "layers": aims, "settings": settings, "report": asdict(found.report)}
    if found.search is None:
        return made
    steps = [{"rate": rate, **asdict(report.all)} for rate, report in found.steps]
    search = {"best": found.search.best, "worst": found.search.worst, "limit": found.search.limit}
    return made | {"search": search | {"interrupted": found.interrupted, "steps": steps}}


def show(found: Found, made: dict[str, Any], output: str, title: str) -> None:
    """Print what was found."""
    if output == "json":
        print_json(made)
        return
    click.echo(title)
    if found.search is not None:
        click.echo(found_line(found.search, ended_early=found.interrupted))
    print_report(found.report)


def draw(drawing: ModuleType, found: Found, path: Path, title: str) -> None:
    """Draw what was found."""
    if found.search is None:
        drawing.plot_seconds(found.report, path, title)
    else:
        drawing.plot_rates(found.steps, path, title)
    click.echo(f"drawn into {path}", err=True)


def check_answered(report: Report, aims: tuple[Target, ...]) -> None:
    """Check that something was answered OK. Raises Unavailable."""
    if report.all.ok:
        return
    which = f"{report.all.due:,} requests to {', '.join(aim.layer for aim in aims)}"
    if not report.all.due:
        raise Unavailable("nothing was measured: no request was due, so give a longer --duration or a higher --rate")
    reasons = "; ".join(f"{code} {number:,} times" for code, number in report.all.failed.items())
    first = next(iter(report.errors.values()), "")
    raise Unavailable(f"none of {which} was answered OK: {reasons}{f', the first: {first}' if first else ''}")
