"""`expertmesh bench` against a cluster in this process: reports, errors in one line, Ctrl-C, swaps meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster
from expertmesh.cluster.bench.report import make_report
from expertmesh.cluster.bench.samples import Measured, Sample
from expertmesh.cluster.bench.search import Search
from expertmesh.cluster.cli.bench_view import notes, search_line
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.experts.weights.files import save_tensors

MESH = """
name: loaded
port: 0
metrics_port: null
transport: local
layers:
  waves:
    gate: {type: fixed, weights: [0.5, 0.5]}
    experts: {sin: {factory: "numpy:sin"}, cos: {factory: "numpy:cos"}}
  news:
    gate: {type: top_k, in_features: 8, num_experts: 3, k: 1}
    input: {dtype: float32}
    experts:
      e0: {factory: "torch.nn:Linear", args: [8, 2]}
      e1: {factory: "torch.nn:Linear", args: [8, 2]}
      e2: {factory: "torch.nn:Linear", args: [8, 2]}
"""
LIGHT = ("--rate", "40", "--duration", "1", "--warmup", "0.2", "--connections", "2")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration file of a running cluster."""
    folder = tmp_path_factory.mktemp("mesh")
    path = folder / "mesh.yaml"
    path.write_text(MESH)
    path.chmod(0o600)
    with Cluster.from_config(path, state_dir=folder / "state"):
        yield path


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPERTMESH_TOKEN", "EXPERTMESH_NAME"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> Result:
    """Run the command in this process, for calls that end before any load."""
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], prog_name="expertmesh")


def start(*arguments: object) -> subprocess.Popen[str]:
    """Run the command in its own process: gRPC's asyncio layer supports one event loop per process."""
    command = [sys.executable, "-m", "expertmesh.entry", "bench", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip


def finished(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    return child.returncode, out, err


def wait_for_requests(client: Client, child: subprocess.Popen[str], more: int = 20) -> None:
    """Wait until the cluster has answered `more` requests."""
    target = client.status()["router"]["requests"] + more
    while client.status()["router"]["requests"] < target:
        assert child.poll() is None
        threading.Event().wait(0.02)


def one_line(result: Result) -> str:
    """The error line of a failed command; checks that it is the only output."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_both_layers_of_the_file_share_the_load(mesh: Path) -> None:
    code, out, err = finished(start(mesh, "--width", "8", *LIGHT))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert out.startswith("cluster loaded, waves, news: 8 rows per request\n")
    sent = {line[0]: int(line[1]) for line in lines if len(line) == 12 and line[0] in ("waves", "news", "all")}
    assert sent["all"] == sent["waves"] + sent["news"] > 10
    assert abs(sent["waves"] - sent["news"]) <= 2
    assert {line[0] for line in lines if line and "/" in line[0]} == {
        "waves/sin", "waves/cos", "news/e0", "news/e1", "news/e2"
    }  # fmt: skip
    assert "client retries: 0" in out
    assert "all answers came from epoch 1" in out


@pytest.mark.slow
def test_the_json_output(mesh: Path, tmp_path: Path) -> None:
    with Client(name="loaded") as client:
        before = client.status()["layers"]["news"]["experts"]
    code, out, err = finished(start(mesh, "--layer", "news", "--rows", 4, *LIGHT, "-o", "json", "--slo-ms", 1e6))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["cluster"] == "loaded"
    assert document["layers"] == {"news": {"shape": [8], "dtype": "float32"}}
    assert (document["settings"]["rows"], document["settings"]["slo_ms"]) == (4, 1e6)
    report = document["report"]
    assert report["all"] == report["layers"]["news"]
    assert report["all"]["due"] == report["all"]["sent"] == report["all"]["ok"] > 10
    assert report["all"]["within_slo"] == 1.0
    latency = report["all"]["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert report["all"]["goodput_rows"] == pytest.approx(4 * report["all"]["achieved"])
    with Client(name="loaded") as client:
        after = client.status()["layers"]["news"]["experts"]
    answered = sum(after[id]["rows"] - before[id]["rows"] for id in after)  # those of the warm-up too
    assert 4 * report["all"]["ok"] <= answered <= 4 * (report["all"]["ok"] + 30)
    assert report["experts"].keys() == after.keys()
    assert sum(report["experts"].values()) > 0


@pytest.mark.slow
def test_a_search_ends_at_the_highest_sustained_rate(mesh: Path) -> None:
    short = ("--duration", "0.3", "--warmup", "0.1", "--rate", "60", "--slo-ms", "0.001")
    code, out, err = finished(start(mesh, "--layer", "news", "--saturate", *short))
    assert code == 0, err
    assert "60 requests/s: " in err
    assert "above 0.001 ms" in err
    assert "no rate was sustained: at " in out
    code, out, err = finished(start(mesh, "--layer", "news", "--saturate", *short[:-2], "-o", "json", "--rate", "300"))
    assert code == 0, err
    search = json.loads(out)["search"]
    assert len(search["steps"]) >= 2
    assert search["worst"] is not None


@pytest.mark.slow
def test_a_swap_meanwhile_is_reported(mesh: Path, tmp_path: Path) -> None:
    weights = tmp_path / "e1.safetensors"
    save_tensors(weights, {"weight": torch.ones(2, 8), "bias": torch.zeros(2)})
    child = start(mesh, "--layer", "news", "--rate", 40, "--duration", 300, "--warmup", 0)
    with Client(name="loaded") as client:
        wait_for_requests(client, child)
        outcome = client.swap({"news/e1": weights}, allow_norm=True)
        wait_for_requests(client, child)
    child.send_signal(signal.SIGINT)
    code, out, err = finished(child)
    assert (code, err) == (0, "")
    assert f"versions changed during the load: epochs {outcome.epoch - 1} (" in out
    assert f"  news/e1: {outcome.before['news/e1']} (" in out


@pytest.mark.slow
def test_ctrl_c_ends_early_and_still_reports(mesh: Path) -> None:
    child = start(mesh, "--layer", "news", "--rate", 40, "--duration", 300, "--warmup", 0)
    with Client(name="loaded") as client:
        wait_for_requests(client, child)
    child.send_signal(signal.SIGINT)
    code, out, err = finished(child)
    assert (code, err) == (0, "")
    assert "ended early, after " in out
    assert "all answers came from epoch " in out


@pytest.mark.slow
def test_a_load_is_plotted(mesh: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    code, _, err = finished(start(mesh, "--layer", "news", *LIGHT, "--plot", picture))
    assert (code, err) == (0, f"plot saved to {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_search_is_plotted(tmp_path: Path) -> None:
    plot = pytest.importorskip("expertmesh.cluster.bench.plot", exc_type=ImportError)
    report = make_report(Measured(seconds=1.0, samples=[Sample("a", 1, 0.0, 0.0, 0.1)]), ["a"])
    empty = make_report(Measured(seconds=1.0), ["a"])
    plot.plot_rates([(20.0, empty), (10.0, report)], tmp_path / "x.svg", "title")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()


def test_without_matplotlib_nothing_is_sent(mesh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "expertmesh.cluster.bench.plot", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    line = one_line(run(mesh, "--plot", tmp_path / "load.png"))
    assert "--plot needs matplotlib, which is not installed; fix it with: pip install matplotlib" in line


@pytest.mark.slow
def test_a_load_without_an_ok_answer_fails(mesh: Path) -> None:
    code, out, err = finished(start(mesh, "--layer", "news", *LIGHT, "--dtype", "int64"))
    assert code == 1
    assert "failed: INVALID_ARGUMENT " in out
    (line,) = err.splitlines()
    assert line.startswith("error: none of ")
    assert "to news was answered OK: INVALID_ARGUMENT " in line


def test_a_cluster_that_does_not_run_is_not_started(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH.replace("loaded", "absent"))
    path.chmod(0o600)
    line = one_line(run(path))
    assert "cluster 'absent' of " in line
    assert line.endswith(f"is not running on this machine: start it with `expertmesh serve {path}`")
    assert one_line(run(path, "--name", "x")).endswith(f"`expertmesh serve {path} --name x`")


def test_errors_are_one_line(mesh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Client(name="loaded").endpoint
    assert "serves no layer 'newz' (did you mean 'news'?)" in one_line(run(mesh, "--layer", "newz"))
    assert "layer waves have no declared shape: give --width" in one_line(run(mesh))
    assert "there is no file" in one_line(run(tmp_path / "none.yaml"))
    assert "no token for 127.0.0.1:1: " in (line := one_line(run("--endpoint", "127.0.0.1:1")))
    assert line.endswith("Pass --token-file, or set EXPERTMESH_TOKEN")
    assert "must have the form host:port" in one_line(run("--endpoint", "nowhere"))
    assert "there is no token file" in one_line(run("--endpoint", endpoint, "--token-file", tmp_path / "none"))
    monkeypatch.setenv("EXPERTMESH_TOKEN", "wrong")
    assert "no cluster answers at 127.0.0.1:1: " in one_line(run("--endpoint", "127.0.0.1:1"))
    assert "this cluster does not know the token" in one_line(run("--endpoint", endpoint))
    result = run("--endpoint", endpoint, "--token-file", token_path("loaded"), "--layer", "newz")
    assert "did you mean 'news'" in one_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "a", "--endpoint", "127.0.0.1:1"), "give --name or --endpoint, not both"),
        (("--rate", "0"), "'--rate'"),
        (("--rows", "0"), "'--rows'"),
        (("--arrivals", "bursty"), "'poisson', 'uniform'"),
        (("--dtype", "complex64"), "'float32'"),
        (("--plot", "/nosuch/folder/load.png"), "--plot needs a file in an existing folder"),
        (("--plot", "load.xyz"), "ending in .png, .svg, .pdf"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_teaches() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for example in ("expertmesh bench mesh.yaml\n", "--saturate --slo-ms 50", "--token-file tokens"):
        assert example in result.stdout


def test_it_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from expertmesh.cluster.cli import bench; print({'ray', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"


def test_the_result_of_a_search_is_one_line() -> None:
    def line(interrupted: bool = False, **fields: Any) -> str:
        return search_line(Search(rate=None, **fields), interrupted=interrupted)

    assert line(best=10.0, worst=11.0, limit="why") == "10 requests/s were sustained, 11 were not: why"
    early = line(interrupted=True, best=10.0)
    assert early == "10 requests/s were sustained; the search was interrupted before it reached the limit"
    assert line(worst=5.0, limit="why") == "no rate was sustained: at 5 requests/s, why"
    assert line(interrupted=True) == "no rate was measured: the search was interrupted"


def test_notes_show_what_the_tables_do_not() -> None:
    samples = [Sample("a", 1, 0.0, 0.0, 0.1, code, epoch=1) for code in ("OK", "NOT_SENT", "UNAVAILABLE")]
    measured = Measured(seconds=1.0, samples=samples, errors={"UNAVAILABLE": "Unavailable: down"}, interrupted=True)
    message = "\n".join(notes(make_report(measured, ["a"], slo_ms=200.0)))
    for part in ("ended early", "failed: UNAVAILABLE 1 times, the first: Unavailable: down", "33.33%", "NOT_SENT: 1"):
        assert part in message
    assert "rows by expert are not known" in message
    assert not np.isnan(make_report(measured, ["a"]).all.achieved)
