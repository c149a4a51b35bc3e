"""`expertmesh apply` against a cluster in this process: the plan as a table and as JSON, and a look changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster, Expert
from expertmesh.cluster.cli.main import cli

MESH = """\
name: applied
port: 0
metrics_port: null
transport: local
layers:
  waves:
    gate: {type: fixed, weights: [0.5, 0.5]}
    input: {shape: [3]}
    experts:
      sin: {factory: "numpy:sin"}
      cos: {factory: "numpy:cos"}
"""
OTHER = MESH.replace("[0.5, 0.5]", "[0.5, 0.3, 0.2]").replace('"numpy:cos"', '"numpy:cosh"') + (
    '      tan: {factory: "numpy:tan", replicas: 2}\n'
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration file of a running cluster."""
    folder = tmp_path_factory.mktemp("mesh")
    path = written(folder / "mesh.yaml", MESH)
    with Cluster.from_config(path, state_dir=folder / "state"):
        yield path


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPERTMESH_TOKEN", "EXPERTMESH_NAME"):
        monkeypatch.delenv(name, raising=False)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def run(path: Path, *arguments: str) -> Result:
    """Apply a file, to the state_dir of the running cluster."""
    here = f"state_dir={path.parent / 'state'}"
    return CliRunner().invoke(cli, ["apply", str(path), "--set", here, *arguments], prog_name="expertmesh")


def test_the_file_that_a_cluster_was_started_from_has_nothing_to_do(mesh: Path) -> None:
    for arguments in ((), ("--dry-run",)):
        result = run(mesh, *arguments)
        assert (result.exit_code, result.output) == (0, "nothing to do\n")
    assert json.loads(run(mesh, "-o", "json").stdout)["steps"] == []


def test_a_plan_is_a_table_for_people_and_json_for_machines(mesh: Path) -> None:
    other = written(mesh.with_name("other.yaml"), OTHER)
    result = run(other, "--dry-run", "--set", "default_timeout=5")
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[1][:3] == ["1", "add_expert", "waves/gate"]
    assert "fixed(weights=[0.5, 0.3, 0.2])" in result.stdout
    assert any(line[:2] == ["waves/tan", "-"] and "numpy:tan" in line for line in table)
    assert any(line[0] == "2" and line[1] == "swap" and "numpy:cosh" in line for line in table)
    assert any(line[:3] == ["-", "restart", "default_timeout"] for line in table)
    assert "what needs a restart is not changed" in result.stdout
    document = json.loads(run(other, "--dry-run", "-o", "json").stdout)
    assert [step["kind"] for step in document["steps"]] == ["add_expert", "swap"]
    assert f"2 steps, plan {document['digest'][:12]}" in result.stdout


def test_a_look_changes_nothing(mesh: Path) -> None:
    other = written(mesh.with_name("other.yaml"), OTHER)
    with Client(name="applied") as client:
        before = client.declared(), client.status()["epoch"]
        assert run(other, "--dry-run").exit_code == 0
        refused = run(other)
        assert refused.exit_code == 1
        assert "nothing was changed" in refused.stderr
        assert (client.declared(), client.status()["epoch"]) == before


def test_a_wrong_file_changes_nothing_and_is_told_with_its_line(mesh: Path) -> None:
    wrong = written(mesh.with_name("wrong.yaml"), MESH.replace("numpy:cos", "numpy:coz"))
    result = run(wrong)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"{wrong}:11: " in result.stderr


def test_what_was_replaced_in_the_program_is_what_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "mesh.yaml", MESH.replace("applied", "replaced"))
    with Cluster.from_config(path, state_dir=tmp_path / "state") as cluster:
        assert run(path, "--dry-run").output == "nothing to do\n"
        cluster.replace("waves/cos", Expert("numpy:cosh"))
        document = json.loads(run(path, "--dry-run", "-o", "json").stdout)
    ((step),) = document["steps"]
    assert (step["kind"], step["changes"][0]["key"]) == ("swap", "waves/cos")
    assert step["changes"][0]["before"]["factory"] == "numpy:cosh"
