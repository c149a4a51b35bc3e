"""`expertmesh train` and `sessions`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.machine.folder_lock import alone_in
from expertmesh.experts.weights.files import save_tensors

MESH = """
layers:
  l:
    gate: {type: top_k, in_features: 4, num_experts: 2, k: 1}
    input: {shape: [4], dtype: float32}
    experts:
      e0: {factory: "torch.nn:Linear", args: [4, 2]}
      e1: {factory: "torch.nn:Linear", args: [4, 2]}
"""
TRAIN = """
mesh: mesh.yaml
data: rows.safetensors
batch: 4
phases:
  - {kind: experts, epochs: 2, lr: 0.05}
  - {kind: joint, epochs: 2, lr: 0.05}
"""
NAME = "train-cli"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="expertmesh")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (120,), generator=generator)
    x = torch.randn(120, 4, generator=generator) + 4.0 * y[:, None]
    save_tensors(tmp_path / "rows.safetensors", {"x": x, "y": y})
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "train.yaml").write_text(TRAIN)
    return tmp_path


def test_it_trains_here_writes_and_goes_on(folder: Path) -> None:
    first = run("train", folder / "train.yaml")
    assert first.exit_code == 0, first.output
    assert "experts: epoch 2/2" in first.output
    assert "held-out accuracy:" in first.output
    assert (folder / "trained" / "mesh.yaml").is_file()
    again = run("train", folder / "train.yaml", "-o", "json")
    told = json.loads(again.stdout)
    assert told["after"] > told["before"]
    assert len(told["epochs"]) == 4
    assert set(told["files"]) == {"l/e0", "l/e1", "l/gate"}
    assert "epoch" not in again.stderr  # nothing was left to do
    fresh = run("train", folder / "train.yaml", "--fresh")
    assert "experts: epoch 2/2" in fresh.output


def test_a_folder_has_one_training_at_a_time(folder: Path) -> None:
    out = folder / "trained"
    with alone_in(out):
        (out / ".checkpoint.safetensors.0123").write_bytes(b"half")
        refused = run("train", folder / "train.yaml")
        assert refused.exit_code == 1
        assert refused.output.strip().endswith(f"another process is at work in {out}: wait for it, or stop it")
    assert run("train", folder / "train.yaml").exit_code == 0
    assert not list(out.glob(".checkpoint*"))


def test_it_trains_in_a_cluster_and_publishes(folder: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": NAME, "state_dir": str(folder / "state")}
    with Cluster.from_config(folder / "mesh.yaml", **options), Client(name=NAME) as client:
        before = client.status()["epoch"]
        trained = run("train", folder / "train.yaml", "--in-cluster", "--name", NAME)
        assert trained.exit_code == 0, trained.output
        assert "not published" in trained.output
        assert client.status()["epoch"] == before
        shown = run("sessions", "--name", NAME, "-o", "json")
        (session,) = json.loads(shown.stdout)
        assert (session["layer"], session["experts"]) == ("l", ["l/e0", "l/e1"])
        assert session["id"] in run("sessions", "--name", NAME).output
        published = run("train", folder / "train.yaml", "--in-cluster", "--publish", "--name", NAME)
        assert published.exit_code == 0, published.output
        assert f"published as epoch {before + 1}" in published.output
        assert json.loads(run("sessions", "--name", NAME, "-o", "json").stdout) == []
        local = run("train", folder / "train.yaml", "--publish", "--name", NAME, "-o", "json")
        assert json.loads(local.stdout)["published"]["epoch"] == before + 2
        again = run("train", folder / "train.yaml", "--in-cluster", "--fresh", "--name", NAME)
        assert again.exit_code == 0
        left = json.loads(run("sessions", "--name", NAME, "-o", "json").stdout)[0]["id"]
        assert run("sessions", "--end", left, "--name", NAME).exit_code == 0
        assert client.training_sessions() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.yaml:1: the file is empty; it needs `mesh` and `data`"),
        ("data: rows.safetensors", "`mesh` is missing"),
        (f"{TRAIN}bath: 3\n", "train.yaml:8: a training has no key 'bath' (did you mean 'batch'?)"),
        (f"{TRAIN}batch: x\n", "train.yaml:8: "),
        (TRAIN.replace("experts, epochs: 2", "experts, epochs: 0"), "train.yaml:6: epochs must be"),
        (TRAIN.replace("kind: joint", "kid: joint"), "train.yaml:7: a phase has no key 'kid'"),
        (TRAIN.replace("mesh.yaml", "none.yaml"), "there is no file"),
        (TRAIN.replace("rows.safetensors", "rows.csv"), "there is no file"),
        (f"{TRAIN}out: .\n", "which the result would replace"),
        (f"{TRAIN}out: mesh.yaml\n", "which is no folder"),
        (f"{TRAIN}layer: m\n", "set `layer` to one of l"),
    ],
)
def test_what_is_wrong_names_file_and_line(folder: Path, text: str, message: str) -> None:
    (folder / "train.yaml").write_text(text)
    done = run("train", folder / "train.yaml")
    assert done.exit_code == 1
    assert message in done.output
    assert not (folder / "trained").exists()
