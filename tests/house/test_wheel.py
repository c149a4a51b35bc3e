"""The wheel holds what the tree holds: a build backend that does not follow the links would make an empty one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("experts", "router", "cluster")
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def wanted() -> set[str]:
    facade = ROOT / "src" / "expertmesh"
    own = {f"expertmesh/{path.name}" for path in facade.iterdir() if path.suffix == ".py"}
    inside = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return own | {"expertmesh/py.typed"} | {f"expertmesh/{path.as_posix()}" for path in inside}


def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: a build leaves its traces beside what it builds
    source.mkdir()
    for folder in (*PACKAGES, "src"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted()
    assert {name.rpartition("/")[2] for name in names} >= {"LICENSE", "entry_points.txt", "METADATA"}
