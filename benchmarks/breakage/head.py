"""Ray's head dies (its GCS is killed): the owner must notice and say so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from benchmarks.home import own_home

from expertmesh import Client, errors
from expertmesh.cluster.runtime.ray_reaper import MARKER

from .scenario import Scenario, Seen

MESH = """\
name: headless
port: 0
metrics_port: null
layers:
  waves:
    gate: {type: fixed, weights: [0.5, 0.5]}
    experts:
      sin: {factory: "torch:sin", num_cpus: 0}
      cos: {factory: "torch:cos", num_cpus: 0}
"""
START_SECONDS = 120.0
NOTICED_SECONDS = 30.0
SECONDS = 15.0
"""Within which the owner has to end."""


def killed() -> Seen:
    """`expertmesh serve`, whose GCS is killed."""
    seen = Seen()
    with own_home() as folder:
        mesh = folder / "mesh.yaml"
        mesh.write_text(MESH)
        mesh.chmod(0o600)
        output = folder / "output"
        with output.open("w") as out:
            owner = subprocess.Popen(
                [sys.executable, "-m", "expertmesh.entry", "serve", str(mesh)], stdout=out, stderr=subprocess.STDOUT
            )
        try:
            _wait_ready(owner, output)
            gcs, folder_of_ray = _child(owner, "gcs_server"), _ray_folder(folder)
            killed_at = time.monotonic()
            os.kill(gcs, signal.SIGKILL)
            try:
                status = owner.wait(NOTICED_SECONDS)
                took = time.monotonic() - killed_at
                good = status != 0 and took <= SECONDS
                seen.note(f"the owner ended with status {status} after {took:.1f} s", good)
            except subprocess.TimeoutExpired:
                seen.note(f"the owner runs on {NOTICED_SECONDS:g} s later", False)
                seen.note(f"health: {_health()}", False)
            last = [line for line in output.read_text().splitlines() if line.strip()][-1]
            seen.note(f"its last line: {last[:140]}", "Traceback" not in output.read_text())
        finally:
            _end(owner)
        left = [process.pid for process in psutil.process_iter() if folder_of_ray in _marks(process)]
        seen.note(f"{len(left)} processes left", not left)
    return seen


def _wait_ready(owner: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "is ready" not in output.read_text():
        if owner.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the cluster did not start: {output.read_text()[-500:]}")
        time.sleep(0.2)
    time.sleep(1)


def _child(owner: subprocess.Popen[bytes], word: str) -> int:
    children = psutil.Process(owner.pid).children(recursive=True)
    return next(child.pid for child in children if word in " ".join(child.cmdline()))


def _ray_folder(home: Path) -> str:
    """The folder that marks all processes of the cluster's own Ray."""
    return str(json.loads((home / "run" / "headless.json").read_text())["ray_temp_dir"])


def _marks(process: psutil.Process) -> str:
    """What tells a process of that Ray: its command line, and the mark in its environment."""
    try:
        return f"{process.environ().get(MARKER)} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def _health() -> str:
    try:
        with Client(timeout=3.0) as client:
            return str(client.health())
    except errors.ExpertMeshError as error:
        return f"{type(error).__name__}"


def _end(owner: subprocess.Popen[bytes]) -> None:
    if owner.poll() is None:
        owner.terminate()
        try:
            owner.wait(20)
        except subprocess.TimeoutExpired:
            owner.kill()


SCENARIOS = (Scenario("Ray's head killed", "the owner ends with a status and one line, leaving nothing", killed),)
