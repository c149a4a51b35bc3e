"""Run files, the lock on a name, and the clearing of what a dead cluster left."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.cluster.machine.name_lock import NameLock, lock_name, may_be_removed
from expertmesh.cluster.machine.run_files import (
    RunFile,
    find,
    find_endpoint,
    home,
    list_all,
    lock_path,
    run_path,
    socket_path,
    start_time,
    token_path,
)
from expertmesh.cluster.machine.tokens import create_token_file
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import ConfigError, DataLoss, FailedPrecondition, NotFound

pytestmark = pytest.mark.usefixtures("own_home")


def make(name: str = "default", endpoint: str = "127.0.0.1:50051", **more: object) -> RunFile:
    return replace(RunFile.of_this_process(name, endpoint, "0.1.0"), **more)  # type: ignore[arg-type]


def dead(name: str = "default", **more: object) -> RunFile:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    child.communicate(b"\n")
    return make(name, pid=child.pid, started=started, **more)


def test_home_is_made_private(own_home: Path) -> None:
    assert home() == own_home
    assert stat.S_IMODE(own_home.stat().st_mode) == 0o700


def test_a_home_that_others_can_write_is_refused(own_home: Path) -> None:
    home().chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        home()


def test_a_home_that_cannot_be_made_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError, match="EXPERTMESH_HOME"):
        home()


def test_reading_makes_nothing(own_home: Path) -> None:
    assert list_all() == []
    assert find_endpoint("127.0.0.1:50051") is None
    assert not own_home.exists()


def test_a_run_file_reads_back_and_is_private() -> None:
    written = make(metrics_endpoint="http://127.0.0.1:9/metrics", ray_temp_dir="/tmp/x")
    written.write()
    assert RunFile.read("default") == written
    assert stat.S_IMODE(run_path("default").stat().st_mode) == 0o600
    assert list_all() == [written]
    written.remove()
    assert list_all() == []
    with pytest.raises(NotFound):
        RunFile.read("default")


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"name": 5}', "\x00"])
def test_a_damaged_run_file_is_told_and_skipped(content: str) -> None:
    home()
    run_path("default").write_text(content)
    with pytest.raises(DataLoss):
        RunFile.read("default")
    assert list_all() == []
    with lock_name("default"):
        assert not run_path("default").exists()


def test_a_field_of_a_later_version_is_ignored() -> None:
    make().write()
    values = json.loads(run_path("default").read_text())
    run_path("default").write_text(json.dumps({**values, "more": 1}))
    assert RunFile.read("default") == make()


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".x", "-x", "a b", "x" * 65])
def test_a_name_that_would_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cluster name"):
        run_path(name)


def test_a_process_is_stale_when_it_ended_or_its_pid_is_used_again() -> None:
    assert not make().is_stale()
    assert make(started=make().started + 1).is_stale()
    assert dead().is_stale()


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.wait()


def test_find_takes_the_only_one_then_default_then_asks() -> None:
    with pytest.raises(NotFound, match=r"start one with Cluster\.start"):
        find()
    make("a").write()
    assert find().name == "a"
    make("b").write()
    with pytest.raises(NotFound, match="among a, b"):
        find()
    make().write()
    assert find().name == "default"
    assert find("b").name == "b"
    with pytest.raises(NotFound, match="'c'"):
        find("c")


def test_find_passes_over_dead_clusters() -> None:
    dead("a").write()
    with pytest.raises(NotFound):
        find("a")
    make("b").write()
    assert find().name == "b"


def test_the_cluster_of_an_endpoint_is_found() -> None:
    for made in (make("a", "127.0.0.1:5001"), make("b", "10.0.0.1:5002"), dead("c", endpoint="127.0.0.1:5003")):
        made.write()
    assert find_endpoint("127.0.0.1:5001") == make("a", "127.0.0.1:5001")
    assert find_endpoint("localhost:5001") == make("a", "127.0.0.1:5001")
    assert find_endpoint("10.0.0.1:5002") == make("b", "10.0.0.1:5002")
    assert find_endpoint("10.0.0.1:5001") is None
    assert find_endpoint("127.0.0.1:5003") is None


def test_a_cluster_is_found_at_each_of_its_routers() -> None:
    several = make("a", "127.0.0.1:5001", endpoints=["127.0.0.1:5001", "127.0.0.1:5002"])
    several.write()
    assert find_endpoint("127.0.0.1:5002") == find_endpoint("127.0.0.1:5001") == several
    assert find_endpoint("127.0.0.1:5003") is None


def test_the_run_file_of_an_earlier_version_has_one_router() -> None:
    written = make(metrics_endpoint="http://127.0.0.1:9/metrics", socket="/run/default.sock")
    written.write()
    values = json.loads(run_path("default").read_text())
    for later in ("endpoints", "sockets", "metrics_endpoints"):
        del values[later]
    run_path("default").write_text(json.dumps(values))
    run = RunFile.read("default")
    assert (run.endpoints, run.sockets) == (["127.0.0.1:50051"], ["/run/default.sock"])
    assert run.metrics_endpoints == ["http://127.0.0.1:9/metrics"]


def test_the_sockets_of_all_routers_go_with_the_run_file() -> None:
    made = make("x")
    made.write()
    sockets = [socket_path("x", number) for number in range(12)]
    assert len({*sockets}) == 12
    for path in sockets:
        path.touch()
    made.remove()
    assert not any(path.exists() for path in sockets)


def test_a_second_claim_is_refused_and_says_who_holds_the_name() -> None:
    with lock_name("x"):
        make("x").write()
        with pytest.raises(
            FailedPrecondition, match=rf"pid {os.getpid()}, endpoint 127.0.0.1:50051.*choose another name"
        ):
            lock_name("x")
        with lock_name("y"):
            pass
        assert RunFile.read("x") == make("x")
    with lock_name("x") as again:
        again.close()
        again.close()


def test_a_claim_holds_against_another_process_and_ends_with_it() -> None:
    code = (
        "from expertmesh.cluster.machine.name_lock import lock_name\nheld = lock_name('x'); print('held', flush=True)"
    )
    code += "; input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(FailedPrecondition, match="already running"):
        lock_name("x")
    child.kill()
    child.communicate()
    lock_name("x").close()
    assert not lock_path("x").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_none() -> None:
    home()
    first, late = NameLock(lock_path("x")), NameLock(lock_path("x"))
    assert first.acquire()
    with pytest.raises(BlockingIOError):
        late.acquire()
    first.close()
    assert not late.acquire()
    late.give_up()
    with lock_name("x"):
        assert lock_path("x").exists()


def test_a_cluster_that_lives_keeps_its_name_even_without_its_lock_file() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    make("x", pid=child.pid, started=start_time(child.pid)).write()
    with pytest.raises(FailedPrecondition):
        lock_name("x")
    child.communicate(b"\n")
    lock_name("x").close()


def test_a_claim_clears_what_a_dead_cluster_left(tmp_path: Path) -> None:
    rays = tmp_path / "ray-of-x"
    (rays / "session").mkdir(parents=True)
    dead("x", ray_temp_dir=str(rays)).write()
    create_token_file(token_path("x"))
    sockets, foreign = [socket_path("x", number) for number in range(3)], socket_path("x.1", 1)
    for path in (*sockets, foreign):
        path.touch()
    make("y").write()
    with lock_name("x"):
        assert not rays.exists()
        assert not any(path.exists() for path in sockets)
        assert foreign.exists()
        assert not run_path("x").exists()
        assert not token_path("x").exists()
        assert run_path("y").exists()
        assert lock_path("x").exists()


def test_a_folder_that_no_cluster_made_is_never_removed(tmp_path: Path) -> None:
    made = tmp_path / "ray"
    made.mkdir()
    (tmp_path / "link").symlink_to(made)
    kept = [home(), tmp_path, Path("/"), Path("/tmp"), Path("relative"), tmp_path / "link", Path.cwd(), Path.home()]
    assert may_be_removed(made)
    assert not any(may_be_removed(folder) for folder in kept)


def test_a_token_file_lies_where_the_run_file_says() -> None:
    home()
    made = make()
    tokens = create_token_file(made.token_path)
    made.write()
    assert tokens[Role.ADMIN] in Path(made.token_path).read_text()
    made.remove()
    assert not Path(made.token_path).exists()
