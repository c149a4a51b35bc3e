"""`expertmesh apply` against a cluster in this process: the plan as a table and as JSON, and a look changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster, DataLoss, Expert, Unavailable
from expertmesh.cluster.cli.changes.carrying_out import Course
from expertmesh.cluster.cli.changes.journal import journal_path
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.config.loader import load_config
from expertmesh.cluster.owner.wanted import wanted_document
from expertmesh.cluster.placement.change_plan import ORDER, Document, Step

MESH = """\
name: applied
port: 0
metrics_port: null
transport: local
allowed_factories: ["numpy:cosh", "numpy:tan", "numpy:tanh"]
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
    other = written(mesh.with_name("other.yaml"), OTHER.replace("numpy:tan", "numpy:arctan"))
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
    assert f"{wrong}:12: " in result.stderr


@dataclass
class Model:
    """A cluster of which only the document is there; it makes every step, but fails before the one numbered `fails`."""

    document: Document
    fails: int | None = None
    made: list[str] = field(default_factory=list)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *raised: object) -> None: ...

    def declared(self) -> Document:
        return self.document

    def status(self) -> dict[str, Any]:
        serves = {id: {"version": "v1"} for id in self.document["experts"]}
        return {"epoch": 1, "layers": {"waves": {"gate": {"id": "waves/gate", "version": "v1"}, "experts": serves}}}

    def history(self, id: str) -> list[dict[str, Any]]:
        return [{"version": "v1", "epochs": [1]}]

    def make(self, course: Course, step: Step) -> None:
        assert course.client is self  # type: ignore[comparison-overlap]
        if self.fails == len(self.made):
            self.fails = None
            raise Unavailable("the cluster is restarting")
        self.document = step.carried_out(self.document)
        self.made.append(f"{step.kind} {step.subject}")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "home"))
    mesh = written(tmp_path / "mesh.yaml", MESH)
    model = Model(wanted_document(load_config(mesh, {"state_dir": str(tmp_path / "state")})))
    monkeypatch.setattr("expertmesh.cluster.cli.changes.apply.connect", lambda *arguments: model)
    monkeypatch.setattr("expertmesh.cluster.cli.changes.carrying_out.CALLS", dict.fromkeys(ORDER, model.make))
    return model


STEPS = ["add_expert waves", "swap waves"]


def undo(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["apply", "--undo", *arguments], prog_name="expertmesh")


def test_a_plan_is_carried_out_and_undone(model: Model, tmp_path: Path) -> None:
    before = model.document
    other = written(tmp_path / "other.yaml", OTHER)
    first = run(other)
    assert (first.exit_code, model.made) == (0, STEPS)
    assert first.stderr.splitlines() == ["1/2 add_expert waves: done", "2/2 swap waves: done"]
    assert run(other).output == "nothing to do\n"
    assert undo("--dry-run").exit_code == 0
    assert model.made == STEPS
    back = undo()
    assert (back.exit_code, model.document) == (0, before)
    assert back.stderr.splitlines() == ["1/2 swap waves: done", "2/2 remove_expert waves: done"]
    assert "nothing to undo" in undo().stderr


@pytest.mark.parametrize("fails", [0, 1])
def test_after_a_stop_in_the_middle_the_same_command_finishes_the_same_plan(
    model: Model, tmp_path: Path, fails: int
) -> None:
    before, other = model.document, written(tmp_path / "other.yaml", OTHER)
    digest = json.loads(run(other, "--dry-run", "-o", "json").stdout)["digest"]
    model.fails = fails
    assert "restarting" in run(other).stderr
    assert model.made == STEPS[:fails]
    rest = json.loads(run(other, "--dry-run", "-o", "json").stdout)
    assert (rest["digest"], len(rest["steps"])) == (digest, 2 - fails)
    assert run(other).exit_code == 0
    assert model.made == STEPS
    assert undo().exit_code == 0
    assert model.document == before


@pytest.mark.parametrize("fails", [0, 1])
def test_what_was_begun_is_undone_and_a_stop_in_the_middle_of_that_too(
    model: Model, tmp_path: Path, fails: int
) -> None:
    before, other = model.document, written(tmp_path / "other.yaml", OTHER)
    model.fails = 1
    run(other)
    assert undo().exit_code == 0
    assert model.document == before
    run(other)
    model.made.clear()
    model.fails = fails
    assert undo().exit_code == 1
    assert undo().exit_code == 0
    assert model.document == before


def test_another_file_begins_another_plan(model: Model, tmp_path: Path) -> None:
    model.fails = 1
    run(written(tmp_path / "other.yaml", OTHER))
    halfway = model.document
    assert run(written(tmp_path / "third.yaml", OTHER.replace("numpy:tan", "numpy:tanh"))).exit_code == 0
    assert undo().exit_code == 0
    assert model.document == halfway


def test_what_somebody_else_has_changed_since_is_not_undone(model: Model, tmp_path: Path) -> None:
    run(written(tmp_path / "other.yaml", OTHER))
    experts = {**model.document["experts"], "waves/cos": {"digest": "x"}}
    changed = model.document = {**model.document, "experts": experts}
    refused = undo()
    assert refused.exit_code == 1
    assert "waves/cos (experts) has changed since the plan was made: plan again" in refused.stderr
    assert model.document == changed


def test_a_plan_of_which_a_step_cannot_be_made_is_not_begun(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.cluster.cli.changes.carrying_out.CALLS", {"add_expert": model.make})
    before = model.document
    refused = run(written(tmp_path / "other.yaml", OTHER))
    assert refused.exit_code == 1
    assert "nothing was changed: a running cluster cannot swap waves. Restart" in refused.stderr
    assert (model.document, model.made) == (before, [])
    assert "nothing to undo" in undo().stderr


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".."])
def test_what_a_cluster_calls_itself_names_no_other_folder(name: str) -> None:
    with pytest.raises(DataLoss, match="which is no name of a cluster"):
        journal_path(name)


def test_a_damaged_journal_is_said(model: Model, tmp_path: Path) -> None:
    run(written(tmp_path / "other.yaml", OTHER))
    journal_path("applied").write_text("{}")
    assert "applied.json is damaged: remove it" in undo().stderr


@pytest.mark.parametrize("arguments", [(), ("mesh.yaml", "--undo")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, ["apply", *arguments], prog_name="expertmesh")
    assert (result.exit_code, "give the file to apply, or --undo" in result.output) == (2, True)


def test_what_was_replaced_in_the_program_is_what_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "mesh.yaml", MESH.replace("applied", "replaced"))
    with Cluster.from_config(path, state_dir=tmp_path / "state") as cluster:
        assert run(path, "--dry-run").output == "nothing to do\n"
        cluster.replace("waves/cos", Expert("numpy:cosh"))
        document = json.loads(run(path, "--dry-run", "-o", "json").stdout)
    ((step),) = document["steps"]
    assert (step["kind"], step["changes"][0]["key"]) == ("swap", "waves/cos")
    assert step["changes"][0]["before"]["factory"] == "numpy:cosh"
