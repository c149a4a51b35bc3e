"""A disk that is full, or read-only, under the state folder: a file system of a few MiB of its own (needs root)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.chaos.figures import harm, judged
from benchmarks.chaos.mesh import Mesh, chaos_mesh, processes, wait_until

from expertmesh import errors

from .scenario import Scenario, Seen

SIZE = "8m"
SHAPE: dict[str, Any] = {"experts": 2, "replicas": 1}
Change = Callable[[Path], None]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of `SIZE` at a folder, while it is entered."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _mount("mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "expertmesh", str(folder))
    try:
        yield folder
    finally:
        _mount("umount", "--lazy", str(folder))
        folder.rmdir()


def full() -> Seen:
    """The disk fills up; swaps are refused and answers go on; with room again, swaps go on too."""

    def fill(disk: Path) -> None:
        with suppress(OSError):
            (disk / "ballast").write_bytes(bytes(64 << 20))

    return _on_a_bad_disk(fill, lambda disk: (disk / "ballast").unlink())


def read_only() -> Seen:
    """The disk turns read-only for whatever is opened from now on, and comes back."""

    def turn(disk: Path) -> None:
        _mount("mount", "--bind", str(disk), str(disk))  # the file system itself has files open for writing
        _mount("mount", "-o", "remount,bind,ro", str(disk))

    return _on_a_bad_disk(turn, lambda disk: _mount("umount", str(disk)))


def _on_a_bad_disk(break_it: Change, mend_it: Change) -> Seen:
    seen = Seen()
    with (
        small_disk(Path(f"/tmp/expertmesh-disk-{time.time_ns()}")) as disk,
        chaos_mesh("bad-disk", **SHAPE, settings={"state_dir": disk / "state"}) as mesh,
    ):
        with mesh.load(rate=50.0) as load:
            _swap(mesh, seen, "before", wanted="committed")
            break_it(disk)
            _swap(mesh, seen, "on the bad disk", wanted="refused")
            (controller,) = processes("ControllerActor")
            controller.kill()  # its successor has to open the registry there
            time.sleep(6)
            seen.note(f"status meanwhile: {_told(mesh)}")
            mend_it(disk)
            wait_until(mesh.state, 60.0, "the controller serves again")
            _swap(mesh, seen, "after", wanted="committed")
        found = judged(mesh.checker(), load)
        seen.note(f"{found['requests']} answers: {found['failed']} failed, {found['wrong']} wrong", not harm(found))
    return seen


def _told(mesh: Mesh) -> str:
    try:
        state = mesh.cluster.status()
    except errors.ExpertMeshError as error:
        return f"{type(error).__name__}: {error.message[:120]}"
    return str(state.get("problem") or {"epoch": state["epoch"]})[:120]


def _swap(mesh: Mesh, seen: Seen, when: str, *, wanted: str) -> None:
    id = mesh.shape.expert_ids[0]
    path, tensors = mesh.make(id)
    try:
        done = mesh.client.swap({id: path}, timeout=30.0)
    except errors.ExpertMeshError as error:
        seen.note(f"swap {when}: {type(error).__name__}: {error.message[:90]}", wanted == "refused")
    else:
        mesh.ledger.committed(done.epoch, done.after, {id: tensors})
        seen.note(f"swap {when}: committed", wanted == "committed")


def _mount(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


PROMISE = "swaps refused with a reason, 0 answers failed or wrong; with the disk back, swaps go on by themselves"
SCENARIOS = (Scenario("full disk", PROMISE, full), Scenario("read-only disk", PROMISE, read_only))
