"""The wheel holds what the tree holds, and with what it asks for, and nothing else, calls a running cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from expertmesh import Cluster, Expert, Layer, gates

ROOT = Path(__file__).parents[2]
PACKAGES = ("experts", "router", "cluster")
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
SCRIPT = """
    import sys
    sys.path.append(sys.argv[1])
    import numpy as np
    from expertmesh import Client
    with Client(sys.argv[2]) as client:
        x = np.array([1.0, 2.0, 3.0], dtype=np.float32)
        reply = client.call("s1", x)
        np.testing.assert_allclose(reply.output, 0.5 * (np.sin(x) + np.cos(x)), rtol=1e-5)
        print(sorted(reply.versions))
    try:
        from expertmesh import Cluster
    except ImportError as error:
        print(error)
    for name in ("torch", "ray", "yaml", "pydantic", "click", "safetensors"):
        try:
            __import__(name)
        except ImportError:
            continue
        sys.exit(f"{name} is installed, so this proves nothing")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves its traces beside what it builds
    source.mkdir()
    for package in (*PACKAGES, "src"):
        shutil.copytree(ROOT / package, source / package, symlinks=True, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what `pip install expertmesh` installs: the wheel, and what it asks for, as it is installed here."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (metadata,) = site.glob("*.dist-info")
    for needed in required_by(PathDistribution(metadata)).values():
        for top in {path.parts[0] for path in needed.files or () if path.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(Path(str(needed.locate_file(top))))
    return site


def required_by(wanted: Distribution) -> dict[str, Distribution]:
    """The distributions that one asks for without any extra, and those that they ask for, by name."""
    found: dict[str, Distribution] = {}
    for requirement in map(Requirement, wanted.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = distribution(requirement.name)
            found |= required_by(found[requirement.name])
    return found


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    facade = ROOT / "src" / "expertmesh"
    own = {f"expertmesh/{path.name}" for path in facade.iterdir() if path.suffix == ".py"}
    inside = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    wanted = own | {"expertmesh/py.typed"} | {f"expertmesh/{path.as_posix()}" for path in inside}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {name.rpartition("/")[2] for name in names} >= {"LICENSE", "entry_points.txt", "METADATA"}


def test_the_base_install_calls_a_running_cluster(base_install: Path) -> None:
    """Neither ray nor torch is there, and nothing else that the wheel does not ask for: Python sees no site folder."""
    layer = Layer("s1", gates.Fixed([0.5, 0.5]), {"sin": Expert("numpy:sin"), "cos": Expert("numpy:cos")})
    with Cluster.start([layer], name="base", port=0, transport="local") as cluster:
        command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(SCRIPT), str(base_install), cluster.endpoint]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "['s1/cos', 's1/gate', 's1/sin']"
    assert "pip install 'expertmesh[cluster]'" in second
