"""The commands swap, rollback and history against a cluster in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.swap_cluster import GATE, NAME, SwapCluster, X, swap_cluster

from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.cli.outcome import outcome_line, phase_line, print_outcome
from expertmesh.cluster.rpc.swaps import SwapOutcome


@pytest.fixture
def live_mesh(tmp_path: Path, own_home: Path) -> Iterator[SwapCluster]:
    with swap_cluster(tmp_path) as running:
        yield running


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="expertmesh")


def documents(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def change(live_mesh: SwapCluster, id: str, seed: int) -> str:
    return f"{id}={live_mesh.weights.file(id, seed)}"


def test_a_set_is_swapped_listed_and_rolled_back(live_mesh: SwapCluster) -> None:
    before = live_mesh.current()
    result = run("swap", change(live_mesh, "l/a", 10), change(live_mesh, GATE, 11), "--max-drift", 5)
    assert result.exit_code == 0, result.stderr
    after = live_mesh.current()
    for id in ("l/a", GATE):
        assert before[id] in result.stdout
        assert after[id] in result.stdout
    assert "swapped in " in result.stdout
    assert "epoch 2 serves" in result.stdout
    assert "uploaded l/a: " in result.stderr
    listed = run("history", "l/a", "--name", NAME)
    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [before["l/a"], after["l/a"]]
    assert ["serves" in line for line in lines[1:]] == [False, True]
    result = run("rollback", "l/a", GATE)
    assert "rolled back in " in result.stdout
    assert live_mesh.current() == before
    assert run("rollback", "l/a", "--to", after["l/a"]).exit_code == 0
    assert live_mesh.current() == before | {"l/a": after["l/a"]}


def test_the_json_output(live_mesh: SwapCluster) -> None:
    result = run("swap", change(live_mesh, "l/a", 10), "-o", "json", "--expect", f"l/a={live_mesh.current()['l/a']}")
    outcome = documents(result)
    assert (outcome["epoch"], outcome["committed"], outcome["pending"]) == (2, True, [])
    assert outcome["after"] == {"l/a": live_mesh.current()["l/a"]}
    assert result.stderr == ""
    history = documents(run("history", "l/a", "-o", "json"))
    assert [item["current"] for item in history] == [False, True]
    back = documents(run("rollback", "l/a", "-o", "json", "--endpoint", live_mesh.cluster.endpoint))
    assert back["after"] == outcome["before"]


def test_a_dry_run_says_so_and_changes_nothing(live_mesh: SwapCluster) -> None:
    before = live_mesh.current()
    result = run("swap", change(live_mesh, "l/a", 10), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "dry run passed in " in result.stdout
    assert "nothing has changed" in result.stdout
    assert live_mesh.current() == before
    assert not documents(run("swap", change(live_mesh, "l/a", 10), "--dry-run", "-o", "json"))["committed"]


def test_a_refusal_is_one_line_and_an_exit_code(live_mesh: SwapCluster, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    for arguments, message in [
        (("swap", f"l/a={bad}"), "bad.safetensors"),
        (("swap", f"l/a={tmp_path / 'none'}"), "cannot read"),
        (("swap", change(live_mesh, "l/z", 10)), "there is no expert or gate 'l/z'"),
        (("swap", change(live_mesh, "l/a", 10), "--expect", "l/a=v9-0123456789ab"), "as expected"),
        (("swap", change(live_mesh, "l/a", 10), "--max-drift", "0"), "max_drift"),
        (("rollback", "l/a"), "no version before"),
        (("rollback", "l/a", "--to", "v9-0123456789ab"), "not registered"),
        (("history", "l/z"), "there is no expert or gate 'l/z'"),
        (("history", "l/a", "--name", "other"), "you have no running cluster 'other' on this machine"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in result.output
    assert live_mesh.call().epoch == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("swap",), "Missing argument 'ID=FILE...'"),
        (("swap", "l/a"), "'l/a' must be ID=FILE"),
        (("swap", "l/a="), "'l/a=' must be ID=FILE"),
        (("swap", "=f"), "'=f' must be ID=FILE"),
        (("swap", "l/a=f", "l/a=g"), "l/a appears twice"),
        (("swap", "l/a=f", "--expect", "l/a"), "'l/a' must be ID=VERSION"),
        (("swap", "l/a=f", "--mode", "triple"), "'triple' is not one of 'double', 'staged_cpu'"),
        (("rollback",), "Missing argument 'ID...'"),
        (("rollback", "l/a", "l/b", "--to", "v1-0123456789ab"), "--to takes a single ID"),
        (("history",), "Missing argument 'ID'"),
        (("history", "l/a", "--name", "a", "--endpoint", "127.0.0.1:1"), "give --name or --endpoint, not both"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("command", ["swap", "rollback", "history"])
def test_help_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"expertmesh {command} news/e3" in result.stdout


def test_status_shows_the_epoch_and_draining_versions(live_mesh: SwapCluster) -> None:
    assert "epoch 1" in run("status").stdout
    assert "draining" not in run("status").stdout
    with live_mesh.client.pin() as lease:
        outcome = live_mesh.swap({"l/a": 10})
        shown = run("status").stdout
        assert "epoch 2" in shown
        assert f"draining: l/a, requests in flight still use {outcome.before['l/a']}" in shown
        assert live_mesh.client.call("l", X, pin=lease).epoch == 1


def test_a_drift_that_was_not_measured_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = SwapOutcome(
        swap_id="s",
        epoch=3,
        before={"l/a": "v1"},
        after={"l/a": "v2"},
        drift={"l/a": None},
        unmeasured={"l/a": "not run"},
    )
    print_outcome(outcome, "table", "swapped")
    assert "the drift of l/a was not measured: not run" in capsys.readouterr().out.splitlines()


def test_lines() -> None:
    assert phase_line({"phase": "staging", "receipts": 1, "needed": 4}).startswith("staging: 1 of 4 replicas")
    assert phase_line({"phase": "flipping"}) == "flipping"
    late = SwapOutcome(swap_id="s", epoch=3, before={}, after={}, flipped=False, pending=["router-1"])
    assert outcome_line(late, "swapped", 1.25) == "swapped in 1.2 s: epoch 3 serves; not yet on router-1"
