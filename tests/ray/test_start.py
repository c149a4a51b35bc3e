"""Starting and stopping as a user does, by the command: Ctrl-C, a replica that cannot load, status and down."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from helpers.leftovers import Session
from helpers.waiting import eventually

from expertmesh.cluster.state.registry import FILE, Registry

pytestmark = pytest.mark.ray
MESH = """
name: {name}
port: 0
layers:
  waves:
    gate: {{type: fixed, weights: [0.5, 0.5]}}
    experts:
      sin: {{factory: "numpy:sin"}}
      other: {other}
"""


@pytest.fixture(autouse=True)
def _transport_of_the_command(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_TRANSPORT", transport)


def mesh(folder: Path, name: str, other: str = '{factory: "numpy:cos"}') -> str:
    path = folder / "mesh.yaml"
    path.write_text(MESH.format(name=name, other=other))
    return str(path)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from expertmesh.entry import main; main()", *arguments]


def serve(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("serve", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    seen = ""
    while word not in seen:
        line = process.stdout.readline()
        assert line, f"ended without {word!r}:\n{seen}"
        seen += line
    return seen


def test_interrupt_while_starting_leaves_nothing(tmp_path: Path, session: Session, nothing_left: None) -> None:
    before = session.files()
    process = serve(mesh(tmp_path, "interrupted"))
    eventually(lambda: any("raylet" in p.name() for p in alive(family(process))), 30, "Ray is starting")
    children = family(process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in output
    eventually(lambda: not alive(children), 10, f"its processes ended: {alive(children)}")
    assert session.files() <= before


def test_replica_that_cannot_load_is_one_error(tmp_path: Path, session: Session, nothing_left: None) -> None:
    before = session.files()
    code = tmp_path / "code"
    code.mkdir()
    (code / "broken_expert.py").write_text("def make():\n    raise RuntimeError('no such table')\n")
    other = f'{{factory: "broken_expert:make", runtime_env: {{working_dir: "{code}"}}}}'
    done = subprocess.run(
        command("serve", mesh(tmp_path, "broken", other)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "waves/other" in line
    assert "no such table" in line
    assert session.files() <= before


def test_a_state_folder_of_another_build_is_one_error(tmp_path: Path, nothing_left: None) -> None:
    with Registry(tmp_path / "state"):
        pass
    with closing(sqlite3.connect(tmp_path / "state" / FILE)) as connection:
        connection.execute("PRAGMA user_version = 1")
    config = Path(mesh(tmp_path, "older"))
    config.write_text(f"state_dir: {tmp_path}/state\n" + config.read_text())
    process = serve(str(config))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "written by an older expertmesh (schema 1" in error


def test_serve_status_down(tmp_path: Path, session: Session, nothing_left: None) -> None:
    before = session.files()
    process = serve(mesh(tmp_path, "served"))
    read_until(process, "127.0.0.1:")
    children = family(process)
    asked = command("status", "--name", "served", "-o", "json")
    status = subprocess.run(asked, capture_output=True, text=True, check=True)
    experts = json.loads(status.stdout)["layers"]["waves"]["experts"]
    assert {replica["state"] for expert in experts.values() for replica in expert["replicas"]} == {"ready"}
    table = subprocess.run(command("status", "--name", "served"), capture_output=True, text=True, check=True)
    assert "waves/sin" in table.stdout
    down = subprocess.run(command("down", "--name", "served"), capture_output=True, text=True, check=False)
    assert down.returncode == 0, down.stderr
    process.communicate(timeout=30)
    assert process.returncode == 0
    eventually(lambda: not alive(children), 10, f"its processes ended: {alive(children)}")
    assert session.files() <= before
    gone = subprocess.run(command("status", "--name", "served"), capture_output=True, text=True, check=False)
    assert gone.returncode == 1
    assert gone.stderr.startswith("error:")


PROGRAM = """
import json, os, signal, subprocess, sys, tempfile
import psutil
from expertmesh import Client, Cluster, Expert, Layer, gates

own_handler = lambda number, frame: None
signal.signal(signal.SIGTERM, own_handler)
silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
before = subprocess.Popen(["sleep", "600"], start_new_session=True, **silent)
cluster = Cluster.start([Layer("a", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})], port=0, transport=sys.argv[1])
with Client(cluster.endpoint) as client:
    client.forward("a", [1.0])
(ray_folder,) = [path for path in os.scandir(tempfile.gettempdir()) if path.name.startswith("expertmesh-")]
after = subprocess.Popen(["sleep", "600"], start_new_session=True, **silent)
log = f"{ray_folder.path}/ray/session_latest/logs/raylet.out"
reads = subprocess.Popen(["tail", "-f", log], **silent)
own = (before, after, reads)
rays = [process for process in psutil.Process().children(recursive=True) if process.pid not in [p.pid for p in own]]
print(json.dumps({
    "handler": signal.getsignal(signal.SIGTERM) is own_handler,
    "mode": oct(ray_folder.stat().st_mode & 0o777),
    "own": [process.pid for process in own],
    "rays": [process.pid for process in rays],
    "listen": [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in (*rays, psutil.Process())
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ],
}))
"""


def test_a_program_keeps_what_is_its_own_and_leaves_nothing(
    session: Session, transport: str, nothing_left: None
) -> None:
    before, others = session.files(), set((session.folder / "ray").glob("session_*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, transport], capture_output=True, text=True, timeout=120, check=False
    )
    (line,) = done.stdout.splitlines()  # Ray prints nothing there
    seen = json.loads(line)
    own = [psutil.Process(pid) for pid in seen["own"]]
    try:
        assert alive(own) == own
        assert seen["handler"]
        assert seen["mode"] == "0o700"
        assert set(seen["listen"]) == {"127.0.0.1"}
        assert len(seen["rays"]) > 3
        assert not [pid for pid in seen["rays"] if psutil.pid_exists(pid)]  # it exited without stopping its cluster
        assert session.files() <= before
        assert set((session.folder / "ray").glob("session_*")) == others  # and started no other Ray at its exit
    finally:
        for process in own:
            process.kill()


@pytest.mark.parametrize("head", ["gcs_server", "raylet"])
def test_a_cluster_without_its_head_ends_and_says_so(
    tmp_path: Path, session: Session, head: str, nothing_left: None
) -> None:
    before = session.files()
    process = subprocess.Popen(
        command("serve", mesh(tmp_path, "headless")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "stop it" not in process.stdout.readline():
        assert process.poll() is None
    children = family(process)
    (found,) = [child for child in children if child.name() == head]
    found.kill()
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"cluster 'headless' has ended: {head} (pid {found.pid})" in error
    assert printed == ""
    eventually(lambda: not alive(children), 10, f"its processes ended: {alive(children)}")
    assert session.files() <= before
    health = subprocess.run(command("status", "--name", "headless"), capture_output=True, text=True, check=False)
    assert health.returncode == 1
