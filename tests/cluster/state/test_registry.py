"""The registry: one map that only commits change, one writer, and nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.stored import E3, E4, GATE, full_disk, record, swapped

from expertmesh.cluster.state.records import REMOVED, VersionRecord
from expertmesh.cluster.state.registry import FILE, Registry, kept_records, removed_layers
from expertmesh.cluster.state.registry_schema import SCHEMA
from expertmesh.cluster.state.registry_tables import KEPT_SWAPS
from expertmesh.experts.errors import (
    Aborted,
    ConfigError,
    DataLoss,
    ExpertMeshError,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    NotFound,
    Unavailable,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def registry(folder: Path) -> Iterator[Registry]:
    with Registry(folder, clock=lambda: 1.75e9) as opened:
        yield opened


def facts(registry: Registry) -> object:
    """All that a registry says, to compare before with after."""
    swaps = registry.open_swaps()
    return registry.current(), registry.epochs(), registry.known(), swaps, registry.declared(E3)


def test_a_new_registry_is_private_and_empty(registry: Registry, folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert facts(registry) == (None, [], set(), [], None)
    assert registry.history(E3) == []
    assert registry.term == 1


def test_commits_are_durable_by_sqlites_strictest_rule(registry: Registry) -> None:
    connection = registry._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA


def test_what_was_written_is_there_after_reopening(folder: Path) -> None:
    with Registry(folder, clock=lambda: 5.0) as first:
        records = record(E3), record(GATE, note="swap x", parent="v0-000000000000")
        epoch = swapped(first, *records, declared={E3: "ab" * 32})
        cluster_id = first.cluster_id
    with Registry(folder) as again:
        assert (again.cluster_id, again.term) == (cluster_id, 2)
        assert again.current() == again.epoch(1) == epoch
        assert epoch.versions == {E3: record(E3).version, GATE: record(GATE).version}
        assert again.version(E3, record().version) == record()
        assert again.declared(E3) == "ab" * 32


def test_a_commit_changes_only_what_it_names(registry: Registry) -> None:
    swapped(registry, record(E3), record(E4))
    swapped(registry, record(E3, 2))
    registry.begin_swap("again", {})
    epoch = registry.commit("again", {E3: record(E3).version}, expect={E4: record(E4).version, "news/e9": None})
    assert epoch.versions == {E3: record(E3).version, E4: record(E4).version}
    assert [(e.number, e.swap_id) for e in registry.epochs()][-1] == (3, "again")


def test_the_same_swap_again_gets_the_epoch_that_it_made(registry: Registry) -> None:
    first = swapped(registry, record(), expect={E3: None})
    swapped(registry, record(counter=2))
    swap_id = f"swap-{record().version}"
    assert registry.commit(swap_id, {E3: record().version}, expect={E3: None}) == first
    assert len(registry.epochs()) == 2
    with pytest.raises(FailedPrecondition, match="other changes"):
        registry.commit(swap_id, {E3: record(counter=2).version}, expect={})
    registry.collect(0, [(E3, record().version)])
    with pytest.raises(FailedPrecondition, match="epoch 1 is not kept"):
        registry.commit(swap_id, {E3: record().version}, expect={})


def test_the_loser_of_a_race_is_told_what_was_found(registry: Registry) -> None:
    swapped(registry, record())
    swapped(registry, record(counter=2), expect={E3: record().version})
    before = registry.current()
    with pytest.raises(Aborted, match=f"{E3}: expected {record().version}, found {record(counter=2).version}"):
        swapped(registry, record(counter=3), expect={E3: record().version})
    with pytest.raises(Aborted, match=f"{E4}: expected v1-.*, found none"):
        registry.commit(f"swap-{record(counter=3).version}", {}, expect={E4: record(E4).version})
    assert registry.current() == before


def test_of_many_threads_with_one_expectation_one_wins(registry: Registry) -> None:
    swapped(registry, record())
    outcomes: list[object] = []

    def race(counter: int) -> None:
        try:
            outcomes.append(swapped(registry, record(counter=counter), expect={E3: record().version}))
        except Aborted as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(counter,)) for counter in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [isinstance(outcome, Aborted) for outcome in outcomes].count(False) == 1
    assert len(outcomes) == 6
    assert len(registry.epochs()) == 2


def test_a_commit_may_take_ids_away_and_says_so_to_who_looks(folder: Path) -> None:
    with Registry(folder) as registry:
        swapped(registry, record(E3), record(E4))
        registry.begin_swap("away", {})
        removed = E4.partition("/")[0] + "/layer"
        epoch = registry.commit("away", {}, expect={}, declared={removed: REMOVED}, removes={E4})
        assert epoch.versions.keys() == {E3}
        assert registry.commit("away", {}, expect={}, removes={E4}) == epoch
    assert kept_records(folder) == {E3: record(E3)}
    assert removed_layers(folder) == {removed}
    assert (kept_records(folder / "none"), removed_layers(folder / "none")) == ({}, set())


def test_a_commit_needs_registered_versions_and_a_swap_that_was_begun(registry: Registry) -> None:
    with pytest.raises(NotFound, match="begin it first"):
        registry.commit("never", {}, expect={})
    registry.begin_swap("s", {})
    with pytest.raises(NotFound, match=f"{record().version} of {E3} is not registered"):
        registry.commit("s", {E3: record().version}, expect={})
    assert registry.current() is None
    assert [swap.swap_id for swap in registry.open_swaps()] == ["s"]


def test_a_version_is_registered_once_and_never_changed(registry: Registry) -> None:
    registry.add_version(record())
    registry.add_version(record())
    with pytest.raises(DataLoss, match="already registered with other content"):
        registry.add_version(record(note="another"))
    assert registry.history(E3) == [record()]
    with pytest.raises(NotFound, match="not registered"):
        registry.version(E3, "v9-000000000000")
    with pytest.raises(InvalidRequest, match="plain values"):
        registry.add_version(record(counter=2, origin={"live": object()}))


def test_history_is_oldest_first(registry: Registry) -> None:
    for counter in (10, 2, 9):
        registry.add_version(record(counter=counter))
    registry.add_version(record(E4, 5))
    assert [found.counter for found in registry.history(E3)] == [2, 9, 10]


def test_a_counter_is_never_given_twice(folder: Path) -> None:
    with Registry(folder) as registry:
        assert [registry.next_counter(E3), registry.next_counter(E3), registry.next_counter(E4)] == [1, 2, 1]
        registry.add_version(record(counter=7))
        assert registry.next_counter(E3) == 8
        assert registry.collect(2, ()) == [record(counter=7)]
    with Registry(folder) as registry:
        assert registry.next_counter(E3) == 9


@pytest.mark.parametrize(
    "id", ["", "news", "news/", "/e3", "news/e3/x", "../e3", "news/..", "news/.e3", "news/e 3", "é/x"]
)
def test_an_id_that_is_none_is_refused(registry: Registry, id: str) -> None:
    with pytest.raises(InvalidRequest, match="layer/expert"):
        registry.next_counter(id)
    with pytest.raises(InvalidRequest, match="layer/expert"):
        swapped(registry, record(E3), declared={id: ""})
    with pytest.raises(InvalidRequest, match="layer/expert"):
        record(id)


@pytest.mark.parametrize(
    "version", ["", "v1", "v1-3FA1C2D40B9E", "v01-3fa1c2d40b9e", "v1-3fa1c2d40b9e\n", "v2-3fa1c2d40b9e"]
)
def test_a_version_that_is_none_is_refused(version: str) -> None:
    with pytest.raises(InvalidRequest):
        replace(record(), version=version)


# The journal


def test_a_swap_is_open_until_it_ends(registry: Registry) -> None:
    begun = registry.begin_swap("s1", {"ids": [E3]})
    assert (begun.state, begun.epoch, begun.ended, begun.plan) == ("open", None, None, {"ids": [E3]})
    assert registry.begin_swap("s1", {"ids": [E3]}) == begun
    with pytest.raises(FailedPrecondition, match="another plan"):
        registry.begin_swap("s1", {"ids": [E4]})
    registry.begin_swap("s2", {})
    assert [swap.swap_id for swap in registry.open_swaps()] == ["s1", "s2"]
    registry.end_swap("s1", "aborted", "a replica\udcff refused")
    registry.end_swap("s1", "aborted", "once more")
    ended = registry.begin_swap("s1", {"ids": [E3]})
    assert (ended.state, ended.message) == ("aborted", "a replica? refused")
    assert [swap.swap_id for swap in registry.open_swaps()] == ["s2"]
    with pytest.raises(Aborted, match="was aborted"):
        registry.commit("s1", {}, expect={})
    assert registry.swap("none") is None


def test_what_is_committed_is_never_called_aborted(registry: Registry) -> None:
    swapped(registry, record())
    swap_id = f"swap-{record().version}"
    with pytest.raises(Aborted, match="already committed"):
        registry.end_swap(swap_id, "aborted")
    registry.end_swap(swap_id, "committed", "all routers flipped")
    swap = registry.swap(swap_id)
    assert swap is not None
    assert (swap.state, swap.epoch, swap.message, swap.ended) == ("committed", 1, "all routers flipped", 1.75e9)


def test_only_a_commit_commits(registry: Registry) -> None:
    registry.begin_swap("s", {})
    with pytest.raises(FailedPrecondition, match="only `commit`"):
        registry.end_swap("s", "committed")
    with pytest.raises(NotFound, match="begin it first"):
        registry.end_swap("never", "aborted")
    with pytest.raises(InvalidRequest, match="ends as"):
        registry.end_swap("s", "open")
    with pytest.raises(InvalidRequest, match="swap id"):
        registry.begin_swap("a/b", {})
    with pytest.raises(InvalidRequest, match="plain values"):
        registry.begin_swap("t", {"live": object()})


# Collection


def test_only_what_nothing_names_is_collected(registry: Registry) -> None:
    for counter in range(1, 6):
        swapped(registry, record(counter=counter))
    gone = registry.collect(1, [(E3, record(counter=2).version)])
    assert [found.counter for found in gone] == [1, 3]
    assert [epoch.number for epoch in registry.epochs()] == [4, 5]
    assert [found.counter for found in registry.history(E3)] == [2, 4, 5]
    with pytest.raises(FailedPrecondition, match="retain_epochs"):
        registry.epoch(3)
    for number in (0, 6):
        with pytest.raises(NotFound, match="no epoch"):
            registry.epoch(number)
    assert registry.collect(1, [(E3, record(counter=2).version)]) == []
    with pytest.raises(InvalidRequest, match="retain_epochs"):
        registry.collect(-1, ())


def test_an_open_swap_keeps_what_its_plan_names_and_what_was_registered_since(registry: Registry) -> None:
    for counter in range(1, 4):
        swapped(registry, record(counter=counter))
    registry.begin_swap("back", {E3: f"rollback {record(counter=1).version}"})
    registry.add_version(record(E4))
    assert [found.counter for found in registry.collect(0, ())] == [2]
    registry.end_swap("back", "aborted")
    assert [(found.id, found.counter) for found in registry.collect(0, ())] == [(E3, 1), (E4, 1)]


def test_the_journal_does_not_grow_for_ever(registry: Registry) -> None:
    swapped(registry, record())
    registry.begin_swap("open", {})
    registry.begin_swap("old", {})
    registry.end_swap("old", "aborted")
    assert registry._connection is not None
    registry._connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'swaps'", (KEPT_SWAPS + 3,))
    registry.begin_swap("new", {})
    registry.collect(0, ())
    kept = ["open", "new", f"swap-{record().version}"]
    assert [registry.swap(swap_id) is not None for swap_id in [*kept, "old"]] == [True, True, True, False]


def test_the_outcome_of_a_swap_outlives_its_epoch_and_its_versions(folder: Path) -> None:
    with Registry(folder) as registry:
        for counter in (1, 2, 3):
            swapped(registry, record(counter=counter))
        registry.collect(0, ())
    with Registry(folder) as registry:
        assert [epoch.number for epoch in registry.epochs()] == [3]
        swap = registry.swap(f"swap-{record(counter=2).version}")
        assert swap is not None
        assert (swap.state, swap.epoch) == ("committed", 2)
        assert (swap.before, swap.after) == ({E3: record().version}, {E3: record(counter=2).version})


def test_a_journal_of_an_earlier_build_is_read_and_gets_outcomes(folder: Path) -> None:
    with Registry(folder) as registry:
        swapped(registry, record())
    with sqlite3.connect(folder / FILE) as db:
        db.execute("DROP TABLE outcomes")
    with Registry(folder) as registry:
        old = registry.swap(f"swap-{record().version}")
        assert old is not None
        assert (old.state, old.before, old.after) == ("committed", {}, {})
        swapped(registry, record(counter=2))
        new = registry.swap(f"swap-{record(counter=2).version}")
        assert new is not None
        assert new.before == {E3: record().version}


def test_a_registry_that_an_earlier_build_kept_with_a_write_ahead_log_is_taken_over(folder: Path) -> None:
    with Registry(folder) as registry:
        swapped(registry, record())
    killed = sqlite3.connect(folder / FILE, isolation_level=None)
    killed.execute("PRAGMA journal_mode = WAL")
    killed.execute("UPDATE counters SET last = 7")
    log = (folder / f"{FILE}-wal").read_bytes()
    main = (folder / FILE).read_bytes()
    killed.close()
    (folder / FILE).write_bytes(main)
    (folder / f"{FILE}-wal").write_bytes(log)  # as a killed process leaves it
    assert log
    with Registry(folder) as registry:
        assert registry.next_counter(E3) == 8
        assert not (folder / f"{FILE}-wal").exists()


# One writer

CHANGES: dict[str, Callable[[Registry], object]] = {
    "add_version": lambda registry: registry.add_version(record(counter=2)),
    "next_counter": lambda registry: registry.next_counter(E3),
    "commit": lambda registry: registry.commit("open", {E3: record(counter=9).version}, expect={}, declared={E3: "00"}),
    "commit again": lambda registry: registry.commit(f"swap-{record().version}", {E3: record().version}, expect={}),
    "begin_swap": lambda registry: registry.begin_swap("another", {"large": "x" * 20_000}),
    "end_swap": lambda registry: registry.end_swap("open", "aborted"),
    "collect": lambda registry: registry.collect(0, ()),
}


def furnish(registry: Registry) -> None:
    """An epoch, a version that nothing needs, and an open swap with a candidate."""
    registry.add_version(record(counter=8))
    swapped(registry, record())
    registry.begin_swap("open", {})
    registry.add_version(record(counter=9))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_writer_that_was_taken_over_changes_nothing(folder: Path, change: Callable[[Registry], object]) -> None:
    with Registry(folder) as old:
        furnish(old)
        with Registry(folder) as new:
            before = facts(new)
            with pytest.raises(Aborted, match="taken over the registry \\(term 2; this one has 1\\)"):
                change(old)
            with pytest.raises(Fenced):
                old.check_writer()
            new.check_writer()
            assert facts(new) == facts(old) == before
            change(new)


def test_a_closed_registry_says_so(registry: Registry) -> None:
    registry.close()
    registry.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        registry.current()


# Disks that refuse


@pytest.mark.parametrize("change", [c for n, c in CHANGES.items() if n != "commit again"])
def test_a_full_disk_leaves_the_old_state_readable(folder: Path, change: Callable[[Registry], object]) -> None:
    with Registry(folder) as registry:
        furnish(registry)
        before = facts(registry)
        with full_disk(), pytest.raises(Unavailable, match="check the file system of state_dir"):
            change(registry)
        assert facts(registry) == before
        change(registry)
        after = facts(registry)
    with Registry(folder) as registry:
        assert facts(registry) == after


def test_a_registry_at_its_size_limit_refuses_and_goes_on(registry: Registry) -> None:
    assert registry._connection is not None
    (pages,) = registry._connection.execute("PRAGMA page_count").fetchone()
    registry._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable, match="full"):
        registry.begin_swap("s", {"large": "x" * 100_000})
    assert registry.begin_swap("s", {}).state == "open"


def test_an_open_outcome_is_settled_by_ending_the_swap(folder: Path) -> None:
    with Registry(folder) as registry:
        furnish(registry)
        with full_disk(), pytest.raises(Unavailable):
            CHANGES["commit"](registry)
        registry.end_swap("open", "aborted", "the disk was full")
        with pytest.raises(Aborted, match="the disk was full"):
            CHANGES["commit"](registry)
    with Registry(folder) as registry:
        assert [epoch.number for epoch in registry.epochs()] == [1]


# Files that cannot be believed


def closed(folder: Path) -> Path:
    with Registry(folder) as registry:
        for counter in range(1, 4):
            swapped(registry, record(counter=counter, note="x" * 5000))
    return folder / FILE


def overwrite(path: Path, start: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[start : start + len(data)] = data
    path.write_bytes(whole)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_bytes(b"not a database at all, but a text\n" * 100),
    "head": lambda path: overwrite(path, 0, b"\xff" * 100),
    "first page": lambda path: overwrite(path, 100, b"\xff" * 3000),
    "middle": lambda path: overwrite(path, 4096, b"\xff" * 8192),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_registry_is_refused_with_what_to_do(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(closed(folder))
    with pytest.raises(DataLoss, match=r"registry\.sqlite in state_dir.*run `expertmesh repair`.*or restore"):
        Registry(folder)


@pytest.mark.parametrize("sql", ["UPDATE epochs SET versions = '{'", "UPDATE epochs SET versions = '[]'"])
def test_a_damaged_epoch_is_noticed(registry: Registry, sql: str) -> None:
    swapped(registry, record())
    assert registry._connection is not None
    registry._connection.execute(sql)
    with pytest.raises(DataLoss, match="damaged"):
        registry.current()


@pytest.mark.parametrize("change", [{"counter": "1"}, {"digest": 5}, {"extra": 1}, {"id": "../x"}])
def test_a_damaged_record_is_noticed(change: dict[str, object]) -> None:
    text = json.dumps(json.loads(record().to_json()) | change)
    with pytest.raises(DataLoss, match="damaged"):
        VersionRecord.from_json(text)
    assert VersionRecord.from_json(record().to_json()) == record()


@pytest.mark.parametrize("sql", ["DROP TABLE swaps", "DELETE FROM meta"])
def test_a_registry_that_lacks_something_is_damaged(folder: Path, sql: str) -> None:
    connection = sqlite3.connect(closed(folder))
    connection.execute(sql)
    connection.commit()
    connection.close()

    def use() -> None:
        with Registry(folder) as registry:
            registry.open_swaps()

    with pytest.raises(DataLoss, match="damaged"):
        use()


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (SCHEMA + 1, f"newer expertmesh \\(schema {SCHEMA + 1}; this one reads {SCHEMA}\\): install"),
        (SCHEMA - 1, f"older expertmesh \\(schema {SCHEMA - 1}; this one reads {SCHEMA}\\).*swap in the weights"),
    ],
)
def test_another_schema_is_refused_and_left_alone(folder: Path, schema: int, said: str) -> None:
    path = closed(folder)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(FailedPrecondition, match=said):
        Registry(folder)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    connection = sqlite3.connect(folder / FILE)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(DataLoss, match="another program's"):
        Registry(folder)


@pytest.mark.parametrize("wipe", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_lost_registry_is_not_begun_anew_over_stored_versions(folder: Path, wipe: Callable[[Path], object]) -> None:
    path = closed(folder)
    (folder / "versions" / "news" / "e3" / record().version).mkdir(parents=True)
    wipe(path)
    with pytest.raises(DataLoss, match="empty or was removed, but stored versions exist"):
        Registry(folder)


def test_a_crash_before_the_first_table_is_no_damage(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / FILE).touch(mode=0o600)
    with Registry(folder) as registry:
        assert registry.term == 1


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        Registry(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="set state_dir"):
            Registry(path)
    tmp_path.chmod(0o700)
    (tmp_path / FILE).symlink_to(tmp_path / "file")
    with pytest.raises(ExpertMeshError, match="set state_dir to a folder that this user can write to"):
        Registry(tmp_path)
