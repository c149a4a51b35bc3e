"""Version folders: whole or not there, whatever the disk or a crash does; and names that lead nowhere else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.stored import E3, E4, GATE, files, full_disk, record

from expertmesh.cluster.state.version_folders import MANIFEST, WEIGHTS, VersionStore
from expertmesh.experts.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound

V1, V2 = record().version, record(counter=2).version
BYTES = b"weights" * 1000
SHA256 = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(state: Path) -> VersionStore:
    return VersionStore(state)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "e3.safetensors"
    path.write_bytes(BYTES)
    return path


def test_a_version_is_a_private_folder_with_weights_and_manifest(
    store: VersionStore, state: Path, source: Path
) -> None:
    folder = store.write(E3, V1, source, {"record": {"note": "declared"}})
    assert folder == store.path(E3, V1) == state / "versions" / "news" / "e3" / V1
    weights = store.weights(E3, V1)
    assert weights is not None
    assert weights.read_bytes() == source.read_bytes() == BYTES
    assert store.manifest(E3, V1) == {
        "id": E3,
        "version": V1,
        "sha256": SHA256,
        "nbytes": len(BYTES),
        "record": {"note": "declared"},
    }
    store.verify(E3, V1)
    parents = [folder, *folder.parents][:5]
    assert {stat.S_IMODE(path.stat().st_mode) for path in parents} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o400}


def test_a_version_without_tensors_has_no_weights(store: VersionStore) -> None:
    store.write(GATE, V1, None, {})
    assert store.weights(GATE, V1) is None
    store.verify(GATE, V1)
    store.write(GATE, V1, None, {})


def test_what_is_not_stored_is_not_found(store: VersionStore, tmp_path: Path) -> None:
    for ask in (store.path, store.weights, store.manifest, store.verify):
        with pytest.raises(NotFound, match="is not stored here"):
            ask(E3, V1)
    with pytest.raises(NotFound, match="no weights file"):
        store.write(E3, V1, tmp_path / "none", {})
    store.remove(E3, V1)


def test_writing_again_changes_nothing(store: VersionStore, source: Path) -> None:
    store.write(E3, V1, source, {"first": True})
    store.write(E3, V1, source, {"first": False})
    assert store.manifest(E3, V1)["first"] is True
    source.write_bytes(b"other")
    for given in (source, None):
        with pytest.raises(DataLoss, match=f"the weights sent for {V1} of {E3}"):
            store.write(E3, V1, given, {})
    store.verify(E3, V1)


def test_weights_other_than_those_declared_are_refused(store: VersionStore, state: Path, source: Path) -> None:
    store.write(E3, V1, source, {"sha256": SHA256})
    with pytest.raises(DataLoss, match="send the right file again"):
        store.write(E3, V2, source, {"sha256": "00" * 32}, move=True)
    with pytest.raises(InvalidRequest, match="plain JSON"):
        store.write(E3, V2, source, {"live": object()}, move=True)
    assert source.read_bytes() == BYTES
    assert all(V1 in name for name in files(state))


def test_a_move_uses_the_source_up_and_may_be_repeated(store: VersionStore, source: Path) -> None:
    inode = source.stat().st_ino
    store.write(E3, V1, source, {"sha256": SHA256}, move=True)
    weights = store.weights(E3, V1)
    assert weights is not None
    assert weights.stat().st_ino == inode
    assert not source.exists()
    store.write(E3, V1, source, {"sha256": SHA256}, move=True)
    store.verify(E3, V1)
    with pytest.raises(DataLoss):
        store.write(E3, V1, source, {"sha256": "00" * 32}, move=True)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_a_move_copies_where_the_disk_cannot_link(
    store: VersionStore, source: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no links")

    monkeypatch.setattr(os, "link", refuse)
    store.write(E3, V1, source, {}, move=True)
    store.verify(E3, V1)
    assert not source.exists()


def test_a_link_is_stored_as_the_file_behind_it(store: VersionStore, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    store.write(E3, V1, link, {}, move=True)
    store.verify(E3, V1)
    weights = store.weights(E3, V1)
    assert weights is not None
    assert not weights.is_symlink()
    assert source.exists()


def test_a_file_is_synced_before_the_rename_and_the_folder_after_it(
    store: VersionStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def spy_sync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append("temporary" if name.startswith(f".{V1}") else name)
        sync(descriptor)

    def spy_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "rename", spy_rename)
    store.write(E3, V1, source, {})
    assert events == [WEIGHTS, MANIFEST, "temporary", "rename", "e3", "news", "versions"]


# Damage

DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / WEIGHTS).write_bytes(BYTES[:-1] + b"x"),
    "truncated": lambda folder: (folder / WEIGHTS).write_bytes(BYTES[:100]),
    "weights gone": lambda folder: (folder / WEIGHTS).unlink(),
    "weights a folder": lambda folder: (folder / WEIGHTS).rename(folder / "x").parent.joinpath(WEIGHTS).mkdir(),
    "manifest gone": lambda folder: (folder / MANIFEST).unlink(),
    "manifest torn": lambda folder: (folder / MANIFEST).write_bytes(b'{"id"'),
    "manifest of another": lambda folder: (folder / MANIFEST).write_text(json.dumps({"id": E4, "version": V1})),
    "manifest bare": lambda folder: (folder / MANIFEST).write_text(json.dumps({"id": E3, "version": V1})),
    "manifest a list": lambda folder: (folder / MANIFEST).write_bytes(b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(store: VersionStore, source: Path, damage: Callable[[Path], object]) -> None:
    folder = store.write(E3, V1, source, {})
    for file in folder.iterdir():
        file.chmod(0o600)
    damage(folder)
    with pytest.raises(DataLoss, match=f"the stored {V1} of {E3} is damaged: .*; restore .*, or swap {E3} again"):
        store.verify(E3, V1)


def test_weights_that_are_gone_are_noticed_without_verifying(store: VersionStore, source: Path) -> None:
    (store.write(E3, V1, source, {}) / WEIGHTS).unlink()
    with pytest.raises(DataLoss, match="its weights file is missing"):
        store.weights(E3, V1)


# Disks that refuse, and crashes, at every step

STEPS = ("open", "fsync", "mkdir", "link", "rename", "chmod")


class Crash(BaseException):
    """The process ends here."""


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, failure: BaseException) -> list[str]:
    """Let the step-th call to the operating system fail; gives the names of those that were made."""
    made: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            made.append(name)
            if len(made) == step:
                raise failure
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    for name in STEPS:
        wrap(name)
    return made


def prepared(folder: Path) -> tuple[VersionStore, Path]:
    """A store with one version, and the file of another."""
    store = VersionStore(folder)
    upload = store.upload_path("upload")
    upload.write_bytes(b"old")
    store.write(E3, V1, upload, {}, move=True)
    upload.write_bytes(BYTES)
    return store, upload


def count_steps(folder: Path, move: bool, patch: pytest.MonkeyPatch) -> int:
    store, upload = prepared(folder)
    made = fail_at(patch, 0, Crash())
    store.write(E4, V2, upload, {}, move=move)
    return len(made)


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_a_disk_that_refuses_any_step_changes_nothing(tmp_path: Path, move: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(tmp_path / "count", move, patch)
    refused = 0
    for step in range(1, steps + 1):
        state = tmp_path / str(step)
        store, upload = prepared(state)
        before = files(state)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, OSError(errno.ENOSPC, "No space left on device"))
            try:
                store.write(E4, V2, upload, {}, move=move)
                continue  # a folder that is there already need not be made
            except FailedPrecondition as error:
                refused += "No space left on device; repair the file system of state_dir or free space" in error.message
        assert {name for name in files(state) if V2 not in name} == before
        assert not [name for name in files(state) if "/." in name]
        store.verify(E3, V1)
        store.write(E4, V2, upload, {}, move=move)
        store.verify(E4, V2)
        assert upload.exists() is not move
    assert refused >= max(10, steps - 1)


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_a_crash_at_any_step_leaves_a_whole_version_or_none(tmp_path: Path, move: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(tmp_path / "count", move, patch)
    whole = 0
    for step in range(1, steps + 1):
        state = tmp_path / str(step)
        store, upload = prepared(state)
        before = files(state)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, Crash())
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(Crash):
                store.write(E4, V2, upload, {}, move=move)
        after = VersionStore(state)
        if (state / "versions" / E4 / V2).exists():
            whole += 1
            after.verify(E4, V2)
        after.sweep({(E3, V1)})
        assert {name for name in files(state) if not name.startswith("quarantine/")} == before
        after.write(E4, V2, upload, {}, move=move)
        after.verify(E4, V2)
    assert 0 < whole < steps


def test_a_disk_without_room_for_the_bytes_changes_nothing(store: VersionStore, state: Path, source: Path) -> None:
    with full_disk(), pytest.raises(FailedPrecondition, match="cannot store"):
        store.write(E3, V1, source, {})
    assert files(state) == set()
    store.write(E3, V1, source, {})
    store.verify(E3, V1)


def test_a_writer_that_was_faster_is_no_error(
    store: VersionStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def overtaken(old: Path, new: Path) -> None:
        shutil.copytree(old, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", overtaken)
    store.write(E3, V1, source, {})
    store.verify(E3, V1)


# Removal


def test_a_sweep_moves_away_what_is_not_known(store: VersionStore, state: Path, source: Path) -> None:
    for version in (V1, V2):
        store.write(E3, version, source, {})
    store.write(GATE, V1, None, {})
    (state / "versions" / "news" / "e3" / f".{V1}.0123").mkdir()
    (state / "versions" / "news" / "e3" / "lost+found").mkdir()
    assert store.sweep({(E3, V2)}) == [(E3, V1), (GATE, V1)]
    store.verify(E3, V2)
    assert {path.name for path in (state / "versions" / "news" / "e3").iterdir()} == {V2, "lost+found"}
    assert store.sweep({(E3, V2)}) == []


def test_a_sweep_deletes_no_version(store: VersionStore, state: Path, source: Path) -> None:
    for content in (b"first", b"second"):
        source.write_bytes(content)
        store.write(E3, V1, source, {})
        assert store.sweep(()) == [(E3, V1)]
    moved = sorted((state / "quarantine" / "versions" / "news" / "e3").iterdir())
    assert {(path / WEIGHTS).read_bytes() for path in moved} == {b"first", b"second"}
    assert moved[0].name == V1


def test_a_sweep_leaves_a_write_that_is_under_way(
    store: VersionStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    swept: list[list[tuple[str, str]]] = []

    def sweep_first(old: Path, new: Path) -> None:
        swept.append(store.sweep(()))
        rename(old, new)

    monkeypatch.setattr(os, "rename", sweep_first)
    store.write(E3, V1, source, {})
    store.verify(E3, V1)
    assert swept == [[]]


def test_a_version_loses_its_name_before_its_files(
    store: VersionStore, state: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(E3, V1, source, {})
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    store.remove(E3, V1)
    monkeypatch.undo()
    with pytest.raises(NotFound):
        store.path(E3, V1)
    assert files(state) != set()
    assert store.sweep(()) == []
    assert files(state) == set()


# Names


@pytest.mark.parametrize("id", ["..", "../..", "news/..", "news/../x", "/etc/passwd", "news", "news/.e3", "a/b\0", ""])
def test_no_id_leads_out_of_the_folder(store: VersionStore, source: Path, id: str) -> None:
    with pytest.raises(InvalidRequest):
        store.write(id, V1, source, {})
    with pytest.raises(InvalidRequest):
        store.remove(id, V1)


@pytest.mark.parametrize("version", ["..", ".", "", f"../{V1}", f"{V1}/..", f".{V1}", f"{V1}\n", "v1"])
def test_no_version_leads_out_of_the_folder(store: VersionStore, version: str) -> None:
    with pytest.raises(InvalidRequest):
        store.path(E3, version)


@pytest.mark.parametrize("upload_id", ["", ".", "..", "a/b", "../x", "x\n", "x" * 129, "a.b"])
def test_no_upload_leads_out_of_the_folder(store: VersionStore, upload_id: str) -> None:
    with pytest.raises(InvalidRequest, match="upload id"):
        store.upload_path(upload_id)


# Uploads


def test_uploads_are_counted_and_dropped_when_stale(state: Path) -> None:
    now = 1_000_000.0
    store = VersionStore(state, clock=lambda: now)
    for name, age in (("old", 100), ("new", 10)):
        store.upload_path(name).write_bytes(b"x" * 50)
        os.utime(store.upload_path(name), (now - age, now - age))
    assert store.uploads_size() == 100
    assert store.drop_stale_uploads(60) == 1
    assert (store.uploads_size(), store.upload_path("new").exists()) == (50, True)


def test_the_state_of_a_cluster_is_read_without_torch_or_ray() -> None:
    """Whoever looks after the state folder starts fast, and needs no extra."""
    code = (
        "import sys, expertmesh.cluster.state.registry, expertmesh.cluster.state.version_folders as v;"
        "sys.exit(bool({'torch', 'ray', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
