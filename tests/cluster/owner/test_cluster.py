"""A cluster as its owner sees it, within this process: what it says of itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Expert, FailedPrecondition, Layer, errors, gates
from expertmesh.cluster.config.cluster_config import ClusterConfig
from expertmesh.cluster.machine.run_files import RunFile, passing_state_path
from expertmesh.cluster.owner import cluster as module

pytestmark = pytest.mark.usefixtures("own_home")


def layer(name: str) -> Layer:
    return Layer(name, gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})


def test_a_cluster_shows_what_it_is_and_whether_it_runs() -> None:
    with Cluster.start([layer("news")], transport="local", port=0, name="shown") as cluster:
        told = f"Cluster(name='shown', endpoint='{cluster.endpoint}', layers=['news'], "
        assert cluster.endpoint
        assert repr(cluster) == f"{told}running)"
    assert repr(cluster) == f"{told}stopped)"


def test_many_layers_are_counted() -> None:
    with Cluster.start([layer(f"l{n}") for n in range(9)], transport="local", port=0, name="shown") as cluster:
        assert ", layers={9 layers}, running)" in repr(cluster)


def test_a_second_cluster_on_a_state_dir_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0, "state_dir": tmp_path / "state"}
    with Cluster.start([layer("news")], name="first", **options) as first, Client(first.endpoint) as client:
        with pytest.raises(FailedPrecondition, match=f"in use by cluster 'first' \\(pid {os.getpid()} "):
            Cluster.start([layer("news")], name="second", **options)
        assert client.forward("news", [0.0]).tolist() == [0.0]
    Cluster.start([layer("news")], name="second", **options).stop()


PROGRAM = """
import os, sys
from expertmesh import Cluster, Expert, Layer, gates

cluster = Cluster.start([Layer("a", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})], transport="local", port=0)
if os.fork() == 0:
    sys.exit()  # as a child that forks and forgets to leave by os._exit
os.wait()
print(*os.listdir(os.environ["EXPERTMESH_HOME"] + "/run"), sep="\\n")
"""


def test_a_cluster_that_was_not_stopped_stops_when_its_process_exits(own_home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert "default.json" in done.stdout.split()  # and not when a child of it exits
    assert done.stderr == ""
    assert [path.name for path in (own_home / "run").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("transport", ["local", "channel"])
def test_what_is_wrong_with_the_state_folder_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(module, "open_backend", lambda config: pytest.fail("a backend was opened"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)  # as Kubernetes leaves a volume with fsGroup
    for folder, reason in ((tmp_path / "shared", "others can write into"), (Path("/dev/null"), "is not a folder")):
        with pytest.raises(errors.ConfigError, match=f"{reason}.*state_dir"):
            Cluster.start([layer("news")], transport=transport, port=0, state_dir=folder)


def test_a_cluster_whose_processes_are_lost_ends_and_says_why(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SUPERVISE_SECONDS", 0.01)
    cluster = Cluster.start([layer("news")], transport="local", port=0, name="lost")
    backend: Any = cluster._backend
    with Client(cluster.endpoint) as client:
        assert client.health() == "SERVING"
        monkeypatch.setattr(backend, "lost", lambda: "gcs_server (pid 7) has ended")
        with pytest.raises(errors.Unavailable, match=r"cluster 'lost' has ended: gcs_server \(pid 7\) has ended"):
            cluster.wait()
        with pytest.raises(errors.Unavailable, match="pid 7"):
            cluster.status()
        eventually(lambda: not (own_home / "run" / "lost.json").exists(), 20, "it has ended")
        with pytest.raises(errors.Unavailable):
            client.health()
    cluster.stop()
    assert repr(cluster).endswith("stopped)")


def test_the_run_file_is_written_anew_where_a_router_says_that_it_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUPERVISE_SECONDS", 0.01)
    with Cluster.start([layer("news")], transport="local", port=0, name="moved", routers=2) as cluster:
        backend: Any = cluster._backend
        before = RunFile.read("moved")
        assert (before.endpoints, [bool(path) for path in before.sockets]) == (cluster.endpoints, [True, True])
        backend._services["router-1"].where = {"endpoint": "10.0.0.9:7", "node": "10.0.0.9/ab"}
        eventually(lambda: cluster.endpoints == [cluster.endpoint, "10.0.0.9:7"], 20, "its clients are told")
        assert RunFile.read("moved").endpoints == cluster.endpoints
        assert RunFile.read("moved").sockets == [before.sockets[0], ""]


def test_the_ports_of_a_cluster_are_held_until_it_stops() -> None:
    with Cluster.start([layer("news")], transport="local", port=0, name="held") as cluster:
        ports = [
            int(cluster.endpoint.rpartition(":")[2]),
            int(cluster.metrics_endpoint.split(":")[2].partition("/")[0]),
        ]
        for port in ports:
            with pytest.raises(errors.FailedPrecondition, match=f"metrics_port 127.0.0.1:{port} cannot be used"):
                Cluster.start([layer("other")], transport="local", port=0, name="other", metrics_port=port)
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_program_that_names_no_state_keeps_none_and_is_told_so(own_home: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0}
    said: list[str] = []
    for _ in range(2):
        with Cluster.start([layer("news")], progress=said.append, **options) as cluster:
            assert cluster.status()["epoch"] == 1
            cluster.replace("news/sin", Expert("numpy:cos"), allow_unverified=True)
    assert len([line for line in said if "give it a name or a state_dir" in line]) == 2
    assert not list(own_home.rglob("registry.sqlite"))


def test_a_configuration_without_a_name_keeps_no_versions_and_one_warning_says_so(own_home: Path) -> None:
    config = ClusterConfig(layers=(layer("news"),), transport="local", port=0)
    with Cluster.start(config=config) as cluster:
        with pytest.warns(UserWarning, match="give it a name or a state_dir"):
            cluster.replace("news/sin", Expert("numpy:cos"), allow_unverified=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cluster.replace("news/sin", Expert("numpy:tan"), allow_unverified=True)
    assert not list(own_home.rglob("registry.sqlite"))


def test_a_start_without_progress_warns_of_what_it_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0, "state_dir": tmp_path / "state"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Cluster.start([layer("news")], **options) as cluster:
            cluster.replace("news/sin", Expert("numpy:cos"), allow_unverified=True)
    with pytest.warns(UserWarning, match="resumed epoch 2") as caught:
        Cluster.start([layer("news")], **options).stop()
    assert {warning.filename for warning in caught} == {__file__}


def test_what_a_dead_cluster_without_state_has_left_is_cleared(own_home: Path) -> None:
    left = passing_state_path("default")
    with Cluster.start([layer("news")], name="default", transport="local", port=0) as cluster:
        kept = cluster.status()["versions"]
    left.mkdir(parents=True)
    (left / "registry.sqlite").write_bytes(b"left")
    with Cluster.start([layer("other")], transport="local", port=0) as cluster:
        assert cluster.status()["versions"].keys() == {"other/sin", "other/gate"}
    with Cluster.start([layer("news")], name="default", transport="local", port=0) as cluster:
        assert cluster.status()["versions"] == kept


def test_a_start_says_what_it_resumes_and_what_differs(tmp_path: Path) -> None:
    two = Layer("news", gates.Fixed([1.0, 1.0]), {"a": Expert("numpy:sin"), "b": Expert("numpy:sin")})
    edited = Layer("news", gates.Fixed([1.0, 1.0]), {"a": Expert("numpy:tan"), "b": Expert("numpy:tan")})
    options: dict[str, Any] = {"transport": "local", "port": 0, "state_dir": tmp_path / "state"}
    said: list[str] = []
    with Cluster.start([two], progress=said.append, **options) as cluster:
        cluster.replace("news/a", Expert("numpy:cos"), allow_unverified=True)
        version = cluster.status()["versions"]["news/a"]
    assert not [line for line in said if "resumed" in line or "state_dir" in line]
    kept = f"news/a serves {version}, which was swapped in; redeclare news/a to serve its edited declaration"
    for declared, more in ((two, [kept]), (edited, ["news/b was replaced: its declaration was edited", kept])):
        said.clear()
        Cluster.start([declared], progress=said.append, **options).stop()
        first = said.index("resumed epoch 2 of its state_dir") + 1
        assert said[first : first + len(more)] == more
