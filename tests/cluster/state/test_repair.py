"""A registry that lost something is noticed at the start, and repaired to exactly what was committed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.stored import E3, E4, files, record

from expertmesh.cluster.state.committed import COMMITTED_FILE
from expertmesh.cluster.state.records import VersionRecord
from expertmesh.cluster.state.registry import FILE, Registry
from expertmesh.cluster.state.repair import repair
from expertmesh.cluster.state.state_lock import lock_state
from expertmesh.cluster.state.version_folders import QUARANTINE, VersionStore
from expertmesh.experts.errors import DataLoss, FailedPrecondition, NotFound

DECLARED = {E4: "cd" * 32}


def commit(folder: Path, *records: VersionRecord, declared: dict[str, str] | None = None) -> None:
    """Store versions and commit them, as a controller does, in a process of its own as it were."""
    store = VersionStore(folder)
    with Registry(folder) as registry:
        registry.begin_swap(f"swap-{records[0].version}", {})
        for made in records:
            source = folder.parent / "upload"
            source.write_bytes(f"weights of {made.id} {made.version}".encode() * 100)
            store.write(made.id, made.version, source, {"record": made.to_json()})
            registry.add_version(made)
        changes = {made.id: made.version for made in records}
        registry.commit(f"swap-{records[0].version}", changes, expect={}, declared=declared)


def facts(folder: Path) -> object:
    with Registry(folder) as registry:
        known, cluster = registry.known(), registry.cluster_id
        records = {pair: registry.version(*pair) for pair in known}
        swaps = [registry.swap(epoch.swap_id) for epoch in registry.epochs()]
        outcomes = [(swap.swap_id, swap.state, swap.epoch) for swap in swaps if swap is not None]
        counters = [registry.next_counter(id) for id in (E3, E4)]
        return cluster, registry.epochs(), records, registry.declared(E4), outcomes, counters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three epochs, and copies of the registry as it was after the first (`early`)."""
    folder = tmp_path / "state"
    commit(folder, record(E3), record(E4), declared=DECLARED)
    shutil.copy(folder / FILE, tmp_path / "early")
    commit(folder, record(E3, 2, note="swap a"))
    commit(folder, record(E3, 3, note="swap b"))
    return folder


def gone_back(folder: Path) -> None:
    shutil.copy(folder.parent / "early", folder / FILE)


def newest_forgotten(folder: Path) -> None:
    """As if the newest commit had never been, with the same counters."""
    with sqlite3.connect(folder / FILE) as db:
        db.execute("DELETE FROM epochs WHERE number = 3")


def other_version_named(folder: Path) -> None:
    """A bit of the file that holds no structure."""
    data = (folder / FILE).read_bytes()
    old, new = record(E3, 3).version, record(E3, 2).version
    (folder / FILE).write_bytes(data.replace(f'{{"{E3}":"{old}"'.encode(), f'{{"{E3}":"{new}"'.encode()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no database": lambda folder: (folder / FILE).write_bytes(b"not a database at all, but a text\n" * 100),
    "gone back": gone_back,
    "newest epoch forgotten": newest_forgotten,
    "another version named": other_version_named,
    "removed": lambda folder: (folder / FILE).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_a_registry_has_lost_is_noticed_and_repaired_exactly(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    shutil.copytree(folder, tmp_path / "whole")
    damage(folder)
    before = files(folder / "versions")
    for _ in range(2):  # and it stays so, however often it is started
        with pytest.raises(DataLoss, match=r"registry.*is damaged.*expertmesh repair"):
            Registry(folder)
    assert files(folder / "versions") == before
    said = "\n".join(repair(folder))
    assert "the registry was rebuilt at epoch 3" in said
    assert files(folder / "versions") == before
    assert facts(folder) == facts(tmp_path / "whole")


def test_what_was_replaced_is_kept(folder: Path) -> None:
    (folder / FILE).write_bytes(b"broken")
    repair(folder)
    assert (folder / QUARANTINE / FILE).read_bytes() == b"broken"


def test_a_whole_registry_is_left_as_it_is(folder: Path) -> None:
    before = files(folder)
    assert repair(folder)[0] == "the registry is whole, and was left as it is"
    assert files(folder) == before | {"state.lock"}


def test_versions_in_quarantine_come_back(folder: Path, tmp_path: Path) -> None:
    """As a start before this one may have left it, which believed a registry that had gone back."""
    shutil.copytree(folder, tmp_path / "whole")
    gone_back(folder)
    assert VersionStore(folder).sweep({(E3, record().version), (E4, record(E4).version)})
    assert not (folder / "versions" / E3 / record(E3, 3).version).exists()
    assert f"{record(E3, 3).version} of {E3} was taken back" in "\n".join(repair(folder))
    assert facts(folder) == facts(tmp_path / "whole")
    VersionStore(folder).verify(E3, record(E3, 3).version)


def test_without_a_record_the_newest_whole_versions_serve(folder: Path) -> None:
    (folder / FILE).unlink()
    text = (folder / COMMITTED_FILE).read_text()
    (folder / COMMITTED_FILE).write_text(text.replace(record(E3, 3).version, record(E3, 2).version))
    weights = folder / "versions" / E3 / record(E3, 3).version / "weights.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"rot")
    said = "\n".join(repair(folder))
    assert "does not match its checksum" in said
    assert "there is no record of what was committed" in said
    with Registry(folder) as registry:
        current = registry.current()
        assert current is not None
        assert current.versions == {E3: record(E3, 2).version, E4: record(E4).version}
        assert registry.next_counter(E3) == 4
    assert (folder / QUARANTINE / COMMITTED_FILE).exists()


def test_a_damaged_version_is_named_and_the_others_are_kept(folder: Path) -> None:
    (folder / FILE).unlink()
    weights = folder / "versions" / E3 / record(E3, 3).version / "weights.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"rot")
    assert f"epoch 3 names {record(E3, 3).version} of {E3}: " in "\n".join(repair(folder))
    with Registry(folder) as registry:
        assert [epoch.number for epoch in registry.epochs()] == [1, 2, 3]


def test_an_older_epoch_whose_versions_were_collected_is_not_restored(folder: Path) -> None:
    with Registry(folder) as registry:
        for gone in registry.collect(0, ()):
            VersionStore(folder).remove(gone.id, gone.version)
    (folder / FILE).unlink()
    repair(folder)
    with Registry(folder) as registry:
        assert [epoch.number for epoch in registry.epochs()] == [3]


def test_a_version_that_the_registry_never_numbered_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Also where no record of commits was written yet, as before there was one."""
    gone_back(folder)
    (folder / COMMITTED_FILE).unlink()
    with pytest.raises(DataLoss, match=f"of {E3} is stored, but the last one that it knows is v1"):
        Registry(folder)


def test_a_damaged_record_is_written_again_from_a_whole_registry(folder: Path) -> None:
    before = (folder / COMMITTED_FILE).read_bytes()
    (folder / COMMITTED_FILE).write_bytes(before[: len(before) // 2])
    Registry(folder).close()
    assert json.loads((folder / COMMITTED_FILE).read_bytes()) == json.loads(before)


def test_a_registry_that_is_ahead_of_the_record_is_believed(folder: Path) -> None:
    """A crash between the two leaves that."""
    before = (folder / COMMITTED_FILE).read_bytes()
    commit(folder, record(E3, 4))
    (folder / COMMITTED_FILE).write_bytes(before)
    with Registry(folder) as registry:
        assert [epoch.number for epoch in registry.epochs()][-1] == 4
    assert hashlib.sha256((folder / COMMITTED_FILE).read_bytes()) != hashlib.sha256(before)


def test_the_registry_of_another_cluster_is_noticed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for counter in (1, 2, 3):
        commit(other, replace(record(E3, counter)))
    shutil.copy(other / FILE, folder / FILE)
    with pytest.raises(DataLoss):
        Registry(folder)


def test_a_folder_in_use_and_a_folder_without_state_are_refused(folder: Path, tmp_path: Path) -> None:
    with lock_state(folder, "cluster 'news'"), pytest.raises(FailedPrecondition, match="in use by cluster 'news'"):
        repair(folder)
    with pytest.raises(NotFound, match="holds no state"):
        repair(tmp_path / "elsewhere")
