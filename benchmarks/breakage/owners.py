"""Damage to what is on disk, and two owners of one state folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.checker import RIGHT
from benchmarks.chaos.exact import rows
from benchmarks.chaos.mesh import Mesh, chaos_mesh

from expertmesh import errors

from .scenario import Scenario, Seen

SHAPE: dict[str, Any] = {"experts": 2, "replicas": 1}
FLIPPED_BYTES = 8
SWAPS = 5


def flipped_bytes() -> Seen:
    """Eight bytes of the registry, or of its log, flip after the whole cluster was killed."""
    return _damaged(0.9, FLIPPED_BYTES)


def overwritten_half() -> Seen:
    """Half of the registry is lost."""
    return _damaged(0.25, None)


def _damaged(place: float, count: int | None) -> Seen:
    seen = Seen()
    with chaos_mesh("damage", **SHAPE) as mesh:
        folder = Path(mesh.settings["state_dir"])
        for _ in range(SWAPS):
            id = mesh.shape.expert_ids[0]
            path, tensors = mesh.make(id)
            done = mesh.client.swap({id: path})
            mesh.ledger.committed(done.epoch, done.after, {id: tensors})
        crashed = folder.with_name("crashed")
        shutil.copytree(folder, crashed)  # nothing is being written: what a loss of power would leave
        mesh.stop()
        shutil.rmtree(folder)
        crashed.rename(folder)
        stored = _weights(folder)
        seen.note(f"{_flip(folder, place, count)}, acknowledged epoch {max(mesh.ledger.epochs)}")
        _restart(mesh, seen)
        lost = stored - _weights(folder)
        seen.note(f"{len(lost)} of {len(stored)} weights files deleted", not lost)
    return seen


def _weights(folder: Path) -> set[str]:
    """The digests of all files of weights below a folder, wherever they were moved."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}


def _flip(folder: Path, place: float, count: int | None) -> str:
    """Flip bytes, or half of all, from a place on in the log, or in the database where everything is in there."""
    log = folder / "registry.sqlite-wal"
    file = log if log.exists() and log.stat().st_size else folder / "registry.sqlite"
    content = bytearray(file.read_bytes())
    at = int(len(content) * place)
    end = at + (count or len(content) // 2)
    content[at:end] = bytes(byte ^ 255 for byte in content[at:end])
    file.write_bytes(content)
    return f"{end - at} bytes flipped in {file.name}"


def _restart(mesh: Mesh, seen: Seen) -> None:
    try:
        mesh.start()
    except errors.DataLoss as error:
        seen.note(f"the start is refused: DataLoss: {error.message[:140]}")
        name, folder = mesh.settings["name"], mesh.settings["state_dir"]
        repair = [sys.executable, "-m", "expertmesh.entry", "repair", "--state-dir", str(folder)]
        ended = subprocess.run(repair, capture_output=True, text=True, timeout=60, check=False)
        said = (ended.stdout + ended.stderr).strip().splitlines()
        seen.note(f"repair of {name}: {said[-1][:140] if said else ''}", ended.returncode == 0)
        mesh.start()
    serving, wanted = mesh.state()["versions"], mesh.ledger.current
    undone = [id for id, version in wanted.items() if serving.get(id) != version]
    seen.note(f"{len(undone)} acknowledged versions undone", not undone)


SECOND = """
import sys
from expertmesh import Cluster, Expert, Layer, errors, gates
layer = Layer("other", gates.Fixed([1.0]), {"e": Expert("torch:sin")})
try:
    Cluster.start([layer], name="second", port=0, metrics_port=None, state_dir=sys.argv[1], start_timeout=60.0).stop()
except errors.ExpertMeshError as error:
    print(f"{type(error).__name__}: {error.message}")
    sys.exit(3)
"""


def two_owners() -> Seen:
    """A second cluster is started on the state folder of one that runs."""
    seen = Seen()
    with chaos_mesh("owner-one", **SHAPE) as mesh:
        before = mesh.state()["versions"]
        began = time.monotonic()
        second = [sys.executable, "-c", SECOND, str(mesh.settings["state_dir"])]
        ended = subprocess.run(second, capture_output=True, text=True, timeout=150, check=False)
        said = (ended.stdout.strip().splitlines() or ["it started"])[-1]
        seen.note(f"the second: {said[:160]} ({time.monotonic() - began:.0f} s)", ended.returncode == 3)
        seen.note("the first serves the versions that it served", mesh.state()["versions"] == before)
        x = rows(0, 2)
        verdict = mesh.checker().judge(x, mesh.client.call(mesh.shape.layer, x))
        seen.note(f"its answer is {verdict}", verdict == RIGHT)
        id = mesh.shape.expert_ids[0]
        epoch = mesh.client.swap({id: mesh.make(id)[0]}).epoch
        seen.note(f"its next swap commits epoch {epoch}")
    return seen


UNDAMAGED = "no version undone in silence, nothing deleted; repair brings all back"
SCENARIOS = (
    Scenario("bytes flipped", UNDAMAGED, flipped_bytes),
    Scenario("half of the registry", UNDAMAGED, overwritten_half),
    Scenario("two owners", "the second is refused and names the first, which serves on", two_owners),
)
