"""The command line, as far as it needs no cluster: exit codes, one line for each error, what commands print."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from expertmesh.cluster.cli import connect
from expertmesh.cluster.cli.down import stop
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.machine.run_files import RunFile, home, run_path, start_time, token_path
from expertmesh.cluster.state.registry import Registry
from expertmesh.experts.errors import DeadlineExceeded, FailedPrecondition, NotFound, Unavailable

pytestmark = pytest.mark.usefixtures("own_home")
SWALLOWED: list[signal.Signals] = []
"""Signals that arrive during a start, inside code that swallows their exception."""

COMMANDS = ("demo", "serve", "status", "swap", "apply", "rollback", "history", "bench", "down", "repair", "doctor")
STATUS: dict[str, Any] = {
    "name": "default",
    "epoch": 3,
    "state": "ready",
    "layers": {
        "news": {
            "gate": {"id": "news/gate", "kind": "top_k", "version": "v1-0123456789ab"},
            "experts": {
                "news/e0": {
                    "version": "v1-3fa1c2d40b9e",
                    "replicas": [
                        {"id": "r0", "node": "n[1]", "pid": 12345, "device": "cpu", "state": "ready"},
                        {
                            "id": "r1",
                            "node": "n[1]",
                            "pid": 12346,
                            "device": "cpu",
                            "state": "down",
                            "problem": "it waits",
                        },
                    ],
                    "rows": 1234567,
                    "errors": 0,
                    "ephemeral": True,
                },
                "news/e1": {"version": "v2-aaaaaaaaaaaa", "replicas": [], "rows": 0, "errors": 2, "ephemeral": False},
            },
        }
    },
    "router": {
        "pid": 7,
        "requests": 1234,
        "failed_requests": 1,
        "retries": 2,
        "rows_in_flight": 8,
        "leases": 0,
        "batches": {"news": 37},
        "messages": {},
        "pins": {"3": 2},
    },
    "controller": {"heard_seconds_ago": 0.03674, "state": "ok"},
    "autoscale": {"news/e0": {"wanted": 4, "up": 1, "down": 0, "reason": "for 5 s rows have waited"}},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces Cluster by a fake that starts nothing; returns the list of its events."""
    events: list[Any] = []

    class FakeCluster:
        endpoint = "127.0.0.1:50051"
        endpoints: ClassVar[list[str]] = [endpoint, "127.0.0.1:50052"]
        metrics_endpoints = ("http://127.0.0.1:9090/metrics",)

        @classmethod
        def start(cls, *, config: Any, name: str, progress: Any, redeclare: Any) -> FakeCluster:
            assert name == config.name  # so that versions are kept
            events.append(config)
            progress("starting")
            for number in SWALLOWED:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(number)
            if SWALLOWED:
                progress("more")
                events.append("went on")
            return cls()

        def wait(self) -> None:
            events.append("waited")

        def __enter__(self) -> FakeCluster:
            return self

        def __exit__(self, *error: object) -> None:
            events.append("stopped")

    launch = ModuleType("expertmesh.cluster.owner.cluster")
    launch.Cluster = FakeCluster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "expertmesh.cluster.owner.cluster", launch)
    monkeypatch.delitem(sys.modules, "expertmesh.cluster.cli.serve", raising=False)
    yield events
    sys.modules.pop("expertmesh.cluster.cli.serve", None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="expertmesh")


def mesh(folder: Path, more: str = "") -> Path:
    path = folder / "mesh.yaml"
    layers = 'layers:\n  w:\n    gate: {type: fixed, weights: [1]}\n    experts: {s: {factory: "torch:sin"}}\n'
    path.write_text(more + layers)
    path.chmod(0o600)
    return path


def running(child: subprocess.Popen[bytes], name: str = "default") -> RunFile:
    cluster = RunFile(
        name=name,
        endpoint="127.0.0.1:50051",
        token_path=str(token_path(name)),
        pid=child.pid,
        started=start_time(child.pid) or 0,
        version="0.1.0",
    )
    cluster.write()
    return cluster


def sleeper(code: str = "pass") -> subprocess.Popen[bytes]:
    """A process that has run `code` and sleeps."""
    text = f"import signal, time; {code}; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_help_lists_every_command_and_is_quick() -> None:
    code = "import sys; from expertmesh.cluster.cli.main import cli; cli(['--help'], standalone_mode=False); "
    code += "print(sorted({'torch', 'ray', 'grpc', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("demo", "serve")])
def test_the_help_of_a_command_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"  expertmesh {command}" in result.output


def test_the_help_of_serve_has_an_example_of_a_file(launched: list[Any]) -> None:
    result = run("serve", "--help")
    assert "expertmesh serve mesh.yaml" in result.output
    assert 'factory: "torch:sin"' in result.output


@pytest.mark.parametrize("arguments", [(), ("nosuch",), ("down", "--timeout", "soon"), ("status", "-o", "xml")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert run("status", "--name", "a", "--endpoint", "b:1").exit_code == 2


def test_an_endpoint_may_be_several(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answering = fake_client(NotFound("nothing there"))
    monkeypatch.setattr("expertmesh.cluster.cli.connect.Client", lambda *a, **k: asked.append(a) or answering(*a, **k))
    for option in ("127.0.0.1:1", "127.0.0.1:1, 127.0.0.1:2"):
        assert run("status", "--endpoint", option).exit_code == 1
    assert asked == [(["127.0.0.1:1"],), (["127.0.0.1:1", "127.0.0.1:2"],)]


def test_version_is_printed() -> None:
    assert run("--version").output.startswith("expertmesh, version ")


def test_an_error_is_one_line_and_debug_shows_where() -> None:
    result = run("status")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: you have no running cluster on this machine")
    assert "`expertmesh serve mesh.yaml` starts one, --name chooses" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert isinstance(run("--debug", "status").exception, NotFound)


def test_an_error_of_ours_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "Client", lambda *args, **options: 1 / 0)
    result = run("status")
    assert result.exit_code == 1
    assert (
        result.stderr == "error: ZeroDivisionError: division by zero (`expertmesh --debug ...` shows the traceback)\n"
    )
    assert isinstance(run("--debug", "status").exception, ZeroDivisionError)


def test_a_command_whose_extra_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "expertmesh.cluster.cli.doctor", raising=False)
    monkeypatch.delitem(sys.modules, "expertmesh.cluster.cli.output", raising=False)
    monkeypatch.delitem(sys.modules, "rich.console", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: `expertmesh doctor` needs rich, which is not installed")
    assert "pip install 'expertmesh[cluster]'" in result.stderr


def fake_client(answer: Any) -> Any:
    class FakeClient:
        def __init__(self, endpoint: str | None, **options: Any) -> None:
            self.options = options

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *error: object) -> None: ...

        def status(self) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    return FakeClient


def test_status_is_a_table_for_people_and_json_for_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "Client", fake_client(STATUS))
    lines = run("status").output.splitlines()
    assert lines[0] == "cluster default: ready, epoch 3"
    first = next(line.split() for line in lines if line.startswith("news/e0"))
    assert first[:4] == ["news/e0", "v1-3fa1c2d40b9e", "(ephemeral)", "1,234,567"]
    assert any("12346" in line and "n[1]" in line and line.rstrip().endswith("down") for line in lines)
    assert "layer news: gate news/gate (top_k), version v1-0123456789ab" in lines
    assert "r1: it waits" in lines
    assert "autoscale: news/e0 is to have 4 replicas: for 5 s rows have waited" in lines
    footer = lines[lines.index("router: pid 7, 1,234 requests, 1 failed, 2 retries, 8 rows in flight, 0 leases") + 1 :]
    assert footer == [
        "  batches by layer: news (37)",
        "  pins by epoch: 3 (2)",
        "controller: ok, last heard from 0.04 s ago",
    ]
    assert json.loads(run("status", "-o", "json").output) == STATUS


def test_status_has_a_line_for_each_of_several_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {
        "endpoint": "127.0.0.1:50051", "node": "10.0.0.1/ab", "pid": 7, "epoch": 3, "rows_in_flight": 8,
        "pins": {"3": 2}, "leases": 1, "state": "ready",
    }  # fmt: skip
    routers = {"router-0": first, "router-1": {"endpoint": "127.0.0.1:50052", "state": "restarting"}}
    document = {**STATUS, "router": {**STATUS["router"], "name": "router-0"}, "routers": routers}
    monkeypatch.setattr(connect, "Client", fake_client(document))
    lines = run("status").output.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["router", "endpoint"]]
    assert lines[head + 1].split() == [
        "router-0", "127.0.0.1:50051", "10.0.0.1/ab", "7", "3", "8", "3", "(2)", "1", "ready",
    ]  # fmt: skip
    assert lines[head + 2].split() == ["router-1", "127.0.0.1:50052", "-", "-", "-", "-", "-", "-", "restarting"]
    assert lines[head + 4].endswith("are those of router-0, which was asked")
    assert lines[head + 5].startswith("router router-0: pid 7, 1,234 requests")
    monkeypatch.setattr(connect, "Client", fake_client({**document, "routers": {"router-0": first}}))
    assert not [line for line in run("status").output.splitlines() if line.startswith("router-0")]


def test_status_of_a_cluster_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "Client", fake_client(Unavailable("the server cannot be reached")))
    result = run("status")
    assert (result.exit_code, result.stderr) == (1, "error: the server cannot be reached\n")


def test_serve_starts_prints_the_endpoint_and_waits(launched: list[Any], tmp_path: Path) -> None:
    options = ("--name", "x", "--port", "0", "--routers", "2", "--set", "log_level=debug")
    result = run("serve", str(mesh(tmp_path)), *options)
    assert result.exit_code == 0, result.output
    config = launched[0]
    assert (config.name, config.port, config.routers, config.log_level) == ("x", 0, 2, "debug")
    assert launched[1:] == ["waited", "stopped"]
    assert str(token_path("x")) in result.stdout
    assert "Client(['127.0.0.1:50051', '127.0.0.1:50052']).forward(\"w\", rows)" in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if "endpoint" in line] == [
        ["endpoint", "127.0.0.1:50051"],
        ["endpoint", "127.0.0.1:50052"],
    ]
    assert "starting" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_interrupt_still_ends_the_start(
    launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(sys.modules[__name__], "SWALLOWED", [number])
    result = run("serve", str(mesh(tmp_path)))
    assert result.exit_code != 0
    assert len(launched) == 1, "neither went on nor waited"
    assert signal.getsignal(number) is before


def test_serve_says_how_to_stop_the_cluster_that_has_the_name(
    launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: Any) -> None:
        raise FailedPrecondition("something is in use")

    monkeypatch.setattr(sys.modules["expertmesh.cluster.owner.cluster"].Cluster, "start", refused)
    assert run("serve", str(mesh(tmp_path)), "--name", "x").stderr == "error: something is in use\n"
    with sleeper() as child:
        running(child, "x")
        result = run("serve", str(mesh(tmp_path)), "--name", "x")
        child.kill()
    advice = "(`expertmesh down --name x` stops it, --name chooses another)"
    assert result.stderr == f"error: something is in use {advice}\n"


def test_serve_lists_every_mistake_and_starts_nothing(launched: list[Any], tmp_path: Path) -> None:
    result = run("serve", str(mesh(tmp_path, "prot: 5\nport: -1\n")), "--set", "nmae=x")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].endswith("mesh.yaml has 3 mistakes:")
    assert [word in line for word, line in zip(("'name'", "yaml:1", "yaml:2"), lines[1:], strict=True)] == [True] * 3
    assert launched == []
    assert run("serve", str(tmp_path / "nosuch.yaml")).stderr.startswith("error: there is no file ")
    assert run("serve").exit_code == 2


def test_down_stops_the_process_and_waits_for_its_end() -> None:
    child = sleeper()
    running(child)
    result = run("down")
    assert result.exit_code == 0, result.output
    assert f"cluster default (pid {child.pid}) stopped after " in result.output
    assert child.wait() == -signal.SIGTERM


def test_down_gives_up_in_time_and_says_what_to_do() -> None:
    child = sleeper("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    now = [0.0]
    try:
        with pytest.raises(DeadlineExceeded, match=f"kill -9 {child.pid}"):
            stop(running(child), 10, clock=lambda: now[0], sleep=lambda _: now.__setitem__(0, now[0] + 1))
    finally:
        child.kill()
        child.wait()
    assert now[0] == 10


def test_down_removes_the_files_of_a_dead_cluster() -> None:
    child = sleeper()
    for name in ("default", "x"):
        running(child, name)
    child.kill()
    child.wait()
    assert "had died" in run("down", "--name", "x").output
    assert not run_path("x").exists()
    assert "had died" in run("down").output
    assert not run_path("default").exists()
    result = run("down")
    assert (result.exit_code, result.stderr) == (1, "error: no cluster is running, so there is nothing to stop\n")
    assert "no cluster named 'x' is running" in run("down", "--name", "x").stderr


def test_down_without_a_name_leaves_several_dead_clusters_alone() -> None:
    child = sleeper()
    for name in ("a", "b"):
        running(child, name)
    child.kill()
    child.wait()
    result = run("down")
    assert result.exit_code == 1
    assert "`expertmesh down --name a` removes the files of a dead one" in result.stderr
    assert run_path("a").exists()
    assert run_path("b").exists()


def test_down_never_signals_another_process_with_the_same_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    home()
    other = RunFile.of_this_process("x", "127.0.0.1:1", "0.1.0")
    reused = RunFile(**{**vars(other), "started": other.started - 1})
    monkeypatch.setattr(os, "kill", lambda *signalled: pytest.fail(f"signalled {signalled}"))
    with pytest.raises(NotFound):
        stop(reused, 1)


def test_doctor_prints_every_check_and_fails_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = json.loads(run("doctor", "-o", "json").output)
    assert {"name", "state", "found", "mend"} == set(checks[0])
    names = [check["name"] for check in checks]
    assert all(name in names for name in ("ray", "torch", "msgpack", "cores", "memory", "/dev/shm", "gpus", "port"))
    table = run("doctor").output
    assert all(name in table for name in names)
    doctor = sys.modules["expertmesh.cluster.cli.doctor"]
    failed = SimpleNamespace(name="x", state="fail", found="y", mend="z")
    monkeypatch.setattr(doctor, "examine", lambda machine: [failed])
    assert run("doctor").exit_code == 1


def test_repair_says_what_it_found_and_did(tmp_path: Path) -> None:
    with Registry(tmp_path / "state") as registry:
        registry.begin_swap("s", {})
        registry.commit("s", {}, expect={})
    assert run("repair", "--state-dir", str(tmp_path / "state")).output.startswith("the registry is whole")
    (tmp_path / "state" / "registry.sqlite").write_bytes(b"rot")
    result = run("repair", "--state-dir", str(tmp_path / "state"))
    assert result.exit_code == 0
    assert "the registry was rebuilt at epoch 1; the damaged one is in quarantine/" in result.output
    assert "holds no state of a cluster" in run("repair", "--name", "never-started").stderr
    assert run("repair", "--name", "a", "--state-dir", "b").exit_code == 2
