"""What all tests share: a home folder of their own, and proof that a test module leaves no process or file behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from expertmesh.cluster.config.cluster_config import ClusterConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set before grpc is imported: its fork handlers run in what Ray forks, and may crash it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", default="channel", help="how rows travel in clusters on Ray: channel or ray")


@pytest.fixture(scope="session", autouse=True)
def transport(request: pytest.FixtureRequest) -> str:
    """How rows travel in clusters that do not say so; the whole suite can be run over either way."""
    chosen: str = request.config.getoption("--transport")
    ClusterConfig.__init__.__kwdefaults__["transport"] = chosen
    return chosen


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run files, tokens and logs of all tests go to a folder that is not the user's."""
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("EXPERTMESH_HOME")
    os.environ["EXPERTMESH_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EXPERTMESH_HOME"]
    else:
        os.environ["EXPERTMESH_HOME"] = before


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that other processes do, with a deadline; fails with `what` when it does not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        threading.Event().wait(0.05)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[[Callable[[], object], float, str], None]:
    return eventually


@pytest.fixture(scope="module")
def nothing_left() -> Iterator[None]:
    """Proves that a module ends with the child processes, shared memory and cluster files that it began with."""
    children, shared, files = _children(), _shared_memory(), _run_files()
    yield
    eventually(lambda: _children() <= children, 15, f"child processes ended: {_children() - children}")
    eventually(lambda: _shared_memory() <= shared, 5, f"shared memory released: {_shared_memory() - shared}")
    assert _run_files() <= files


def _children() -> set[str]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline()):
                found.add(f"{process.pid} {process.name()}")
        except psutil.NoSuchProcess:
            continue
    return found


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _run_files() -> set[str]:
    run = Path(os.environ["EXPERTMESH_HOME"]) / "run"
    return {path.name for path in run.glob("*") if path.suffix != ".lock"}
