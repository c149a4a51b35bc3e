"""`expertmesh examples` and `example`, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expertmesh.cluster.applications.live_update import LiveUpdate
from expertmesh.cluster.applications.result import Job, Measured
from expertmesh.cluster.applications.result import Result as Found
from expertmesh.cluster.cli.applications.examples import NAMES
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.machine.folder_lock import alone_in
from expertmesh.examples import images


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="expertmesh")


def found(job: Job, failed: int = 0) -> Found:
    model = Measured(model="sparse layer", quality={"accuracy": 0.9}, parameters=10, active=5, flops=20.0)
    update = LiveUpdate(requests=9, failed=failed, mixed=0, epochs=2, versions={"l/e0": "v2-a"}, before=0.5, after=0.6)
    return Found(models=(model,), update=update, lines=(f"side {job.options['side']}",))


def test_they_are_listed_with_what_they_show() -> None:
    listed = json.loads(run("examples", "-o", "json").stdout)
    assert list(listed) == list(NAMES)
    assert all(about.endswith((".", ":")) and len(about) > 20 for about in listed.values())
    assert "text_classification" in run("examples").stdout


def test_one_runs_and_prints_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "run", found)
    done = run("example", "images", "--out", tmp_path / "out", "--seeds", 2, "--set", "side=16")
    assert done.exit_code == 0, done.output
    assert "sparse layer" in done.stdout
    assert (
        "seed 1: live update under 9 requests, 0 failed, 0 mixed; quality 0.5 before, 0.6 after; l/e0 v2-a"
        in done.stdout
    )
    assert "side 16" in done.stdout
    assert (tmp_path / "out" / "images.png").is_file()
    told = json.loads(run("example", "images", "--out", tmp_path / "out", "--set", "side=16", "-o", "json").stdout)
    assert told["ok"]
    assert set(told["results"]) == {"0", "1", "2"}


def test_a_failed_request_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "run", lambda job: found(job, failed=1))
    assert run("example", "images", "--out", tmp_path / "out", "--seed", 3).exit_code == 1


def test_what_is_asked_wrongly_is_one_line(tmp_path: Path) -> None:
    for words, message in (
        (("imagse",), "there is no example 'imagse' (did you mean 'images'?)"),
        (("images", "--set", "sides=3"), "--set sides=3: example images has the options side=32, width=8"),
        (("images", "--set", "side"), "--set side: example images has the options side=32, width=8"),
    ):
        done = run("example", *words, "--out", tmp_path / "out")
        assert done.exit_code == 1
        assert done.output.strip() == f"error: {message}"
    with alone_in(tmp_path / "out"):
        assert "another process is at work in" in run("example", "images", "--out", tmp_path / "out").output


def test_a_script_tells_its_errors_as_the_command_does(tmp_path: Path) -> None:
    script = Path(images.__file__)
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [sys.executable, str(script), "--data", str(empty), "--out", str(tmp_path / "out"), "--small"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {empty}: ")
    assert len(done.stderr.splitlines()) == 1
