"""What all tests share: folders of their own, and proof that a test module leaves no process or file behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from helpers.leftovers import Session

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set before grpc is imported: its fork handlers run in what Ray forks, and may crash it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

hypothesis.settings.register_profile("no clock", deadline=None)  # how long an example takes is no property of the code
hypothesis.settings.load_profile("no clock")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", default="channel", help="how rows travel in clusters on Ray: channel or ray")


@pytest.fixture(scope="session")
def transport(request: pytest.FixtureRequest) -> str:
    """How rows travel in the clusters of tests/ray, which can be run over either way."""
    chosen: str = request.config.getoption("--transport")
    return chosen


@pytest.fixture(scope="session", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Run files, tokens, logs and temporary files of all tests go to folders that are this session's alone.

    No setting of the user's environment reaches a test. The temporary folder has a short path, which sockets need.
    """
    made = Session(home=tmp_path_factory.mktemp("home"), folder=Path(tempfile.mkdtemp(prefix="t-")))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("EXPERTMESH_")]:
            patch.delenv(name)
        patch.setenv("EXPERTMESH_HOME", str(made.home))
        patch.setenv("TMPDIR", str(made.folder))
        patch.setattr(tempfile, "tempdir", None)
        yield made
    shutil.rmtree(made.folder, ignore_errors=True)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, still to be made, for one test alone."""
    folder = tmp_path / "home"
    monkeypatch.setenv("EXPERTMESH_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def nothing_left(session: Session) -> Iterator[None]:
    """Proves that a module ends with the processes, shared memory and files that it began with."""
    before = session.traces()
    yield
    before.check_nothing_came()
