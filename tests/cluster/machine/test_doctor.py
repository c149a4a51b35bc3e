"""The doctor's checks on machines that are made up, and the look at this one."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.cluster.machine.doctor import (
    BASE,
    CLUSTER,
    DEMO,
    EXAMPLES,
    GIB,
    PACKAGES,
    PYTHON,
    Check,
    examine,
    release,
)
from expertmesh.cluster.machine.facts import Machine, cores, gpus, look, memory_bytes, open_to_others, ray_processes
from expertmesh.cluster.machine.ports import is_free
from expertmesh.cluster.machine.run_files import RunFile

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
GOOD = Machine(
    python=(3, 11, 7),
    versions={**BASE, **CLUSTER, **DEMO, **EXAMPLES},
    cores=8,
    memory=32 * GIB,
    memory_free=16 * GIB,
    shared_memory=8 * GIB,
    gpus=(),
    clusters=(),
    stale=(),
    port=50051,
    port_free=True,
    ray=(),
)
CLUSTER_X = RunFile(
    name="x", endpoint="127.0.0.1:50051", token_path="/t", pid=1, started=1, version="0.1.0", ray_temp_dir="/tmp/x"
)
TWO_ROUTERS = replace(CLUSTER_X, endpoints=["127.0.0.1:50050", "127.0.0.1:50051"])


def found(machine: Machine, name: str) -> list[Check]:
    return [check for check in examine(machine) if check.name == name]


def test_a_good_machine_has_nothing_to_mend() -> None:
    assert all(check.state == "ok" and not check.mend for check in examine(GOOD))


@pytest.mark.parametrize(
    ("name", "change", "state"),
    [
        ("python", {"python": (3, 9, 1)}, "fail"),
        ("cores", {"cores": 1}, "warn"),
        ("memory", {"memory_free": GIB // 2}, "fail"),
        ("memory", {"memory_free": 2 * GIB}, "warn"),
        ("memory", {"memory": None}, "warn"),
        ("/dev/shm", {"shared_memory": 64 << 20}, "warn"),
        ("/dev/shm", {"shared_memory": None}, "warn"),
        ("gpus", {"gpus": ("H200",), "versions": {**GOOD.versions, "torch": "2.13.0+cpu"}}, "warn"),
        ("gpus", {"gpus": ("H200",), "versions": {**GOOD.versions, "torch": "2.13.0+cu130"}}, "ok"),
        ("stale cluster", {"stale": (CLUSTER_X,)}, "warn"),
        ("port", {"port_free": False}, "warn"),
        ("port", {"port_free": False, "clusters": (CLUSTER_X,)}, "ok"),
        ("port", {"port_free": False, "clusters": (TWO_ROUTERS,)}, "ok"),
        ("router", {"clusters": (TWO_ROUTERS,), "silent": ("127.0.0.1:50051",)}, "warn"),
        ("other ray", {"ray": ("pid 7, logs /tmp/ray/s",)}, "warn"),
        ("other ray", {"ray": ("pid 7, logs /tmp/x/s",), "clusters": (CLUSTER_X,)}, "ok"),
        ("other ray", {"ray": ("pid 7, logs /tmp/x2/s",), "clusters": (CLUSTER_X,)}, "warn"),
        ("other ray", {"ray": ("RAY_ADDRESS=auto",), "clusters": (CLUSTER_X,)}, "warn"),
        ("ray ports", {"open_to_others": ("raylet (pid 7) on 8076",)}, "warn"),
    ],
)
def test_what_is_wrong_is_judged_and_says_how_to_mend_it(name: str, change: dict[str, object], state: str) -> None:
    (check,) = found(replace(GOOD, **change), name)  # type: ignore[arg-type]
    assert check.state == state
    assert bool(check.mend) == (state != "ok")


def test_all_routers_of_a_cluster_are_told_and_one_that_does_not_listen(own_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen, as its owner does for a router that restarts
        endpoints = [f"127.0.0.1:{one.getsockname()[1]}" for one in (server, held)]
        RunFile.of_this_process("x", endpoints[0], "0.1.0", endpoints=endpoints).write()
        machine = look((), 50051)
    assert machine.silent == (endpoints[1],)
    (clusters,) = found(machine, "clusters")
    assert clusters.found.startswith(f"x at {endpoints[0]} and {endpoints[1]} (pid ")
    (router,) = found(machine, "router")
    assert (router.state, router.found) == ("warn", f"{endpoints[1]} of x does not listen")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_checked_against_its_least_version(package: str) -> None:
    optional = package in {**DEMO, **EXAMPLES}
    missing = replace(GOOD, versions={**GOOD.versions, package: None})
    old = replace(GOOD, versions={**GOOD.versions, package: "0.0.9"})
    assert [check.state for check in found(missing, package)] == ["warn" if optional else "fail"]
    assert [check.state for check in found(old, package)] == ["fail"]


def test_the_least_versions_are_those_of_the_project_file() -> None:
    declared = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', PROJECT.read_text(encoding="utf-8").partition("dev = [")[0]))
    del declared["setuptools"]
    assert declared == {**BASE, **CLUSTER, **DEMO, **EXAMPLES}
    assert f'requires-python = ">={PYTHON[0]}.{PYTHON[1]}"' in PROJECT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("1.2rc1", (1, 2)), ("3", (3,)), ("dev", ())]
)
def test_versions_compare_by_their_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers
    assert release("2.10") > release("2.9.1")


def test_a_look_at_this_machine_finds_its_parts(own_home: Path) -> None:
    machine = look(("numpy", "no-such-package"), 0)
    assert machine.versions["numpy"]
    assert machine.versions["no-such-package"] is None
    assert machine.cores >= 1
    assert machine.memory
    assert machine.memory_free
    assert not own_home.exists()


def test_a_container_has_what_its_limits_leave(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    assert memory_bytes(tmp_path) == (1000 * 1024, 900 * 1024)
    write(tmp_path, "sys/fs/cgroup/memory.max", "512000\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "112000\n")
    assert memory_bytes(tmp_path) == (512000, 400000)
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    assert memory_bytes(tmp_path) == (1000 * 1024, 900 * 1024)
    write(tmp_path, "sys/fs/cgroup/cpu.max", "100000 100000\n")
    assert cores(tmp_path) == 1
    assert memory_bytes(tmp_path / "nowhere") == (None, None)


def test_gpus_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    assert gpus(tmp_path) == ()
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA H200\nIRQ: 5\n")
    assert gpus(tmp_path) == ("NVIDIA H200",)


def test_a_ray_that_runs_is_seen() -> None:
    def running(*words: str, **environ: str) -> subprocess.Popen[bytes]:
        command = [words[0], "-c", "import time; time.sleep(60)", *words[1:]]
        return subprocess.Popen(command, executable=sys.executable, env=environ)

    with (
        running("/x/gcs_server", "--log_dir=/y/logs") as plain,
        running("gcs_server", RAY_worker_niceness="0") as nice,
        running("python", "gcs_server") as other,
    ):
        try:
            first, *seen = ray_processes({"RAY_ADDRESS": "auto"})
            assert first == "RAY_ADDRESS=auto"
            assert f"pid {plain.pid}, logs /y/logs, workers at nice 15" in seen
            assert f"pid {nice.pid}, logs unknown, workers at nice 0" in seen
            assert not [text for text in ray_processes({}) if f"pid {other.pid}," in text or "RAY_ADDRESS" in text]
        finally:
            for process in (plain, nice, other):
                process.kill()


LISTENS = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode())  # PR_SET_NAME
servers = [socket.create_server((host, 0)) for host in sys.argv[2:]]
print(*(server.getsockname()[1] for server in servers), flush=True)
input()
"""


def test_ports_of_ray_that_others_can_reach_are_seen() -> None:
    @contextmanager
    def running(name: str, *hosts: str) -> Iterator[tuple[int, list[str]]]:
        command = [sys.executable, "-c", LISTENS, name, *hosts]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            yield process.pid, process.stdout.readline().split()
            process.communicate("\n")

    with (
        running("raylet", "0.0.0.0", "127.0.0.1") as (pid, ports),
        running("ray::Actor", "127.0.0.1") as (closed, _),
        running("other", "0.0.0.0") as (other, _),
    ):
        seen = open_to_others()
    assert f"raylet (pid {pid}) on {ports[0]}" in seen
    assert not [text for text in seen if f"(pid {closed})" in text or f"(pid {other})" in text]


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
    assert is_free("127.0.0.1", port)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
