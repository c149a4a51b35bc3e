"""`expertmesh apply` changes what experts and gates of a running cluster compute, and takes it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.waiting import eventually
from torch import nn

from expertmesh import Client, Cluster
from expertmesh.cluster.cli.main import cli
from expertmesh.experts.weights.files import save_module, save_tensors
from expertmesh.router import gates

MESH = """\
name: changed
port: 0
metrics_port: null
transport: local
allowed_factories: ["numpy:sin", "numpy:cos", "numpy:cosh", "torch.nn:Linear"]
layers:
  waves:
    gate: {type: fixed, weights: [0.5, 0.5]}
    input: {shape: [4], dtype: float32}
    experts:
      sin: {factory: "numpy:sin"}
      cos: {factory: "numpy:cos"}
  linear:
    gate: {type: top_k, in_features: 4, num_experts: 2, k: 2, weights: gate.safetensors}
    input: {shape: [4], dtype: float32}
    experts:
      e0: {factory: "torch.nn:Linear", args: [4, 2], weights: e0.safetensors}
      e1: {factory: "torch.nn:Linear", args: [4, 2]}
"""
OTHER = (
    MESH.replace("numpy:cos}", "numpy:cosh}")
    .replace('"numpy:cos"}', '"numpy:cosh"}')
    .replace("[0.5, 0.5]", "[0.75, 0.25]")
    .replace("gate.safetensors", "gate_v2.safetensors")
    .replace("e0.safetensors", "e0_v2.safetensors")
)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@dataclass
class Running:
    """A cluster in this process that was started from a file of a folder."""

    folder: Path

    def start(self, text: str) -> Cluster:
        return Cluster.from_config(self.written(text), state_dir=self.folder / "state")

    def written(self, text: str) -> Path:
        path = self.folder / "mesh.yaml"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return path

    def apply(self, text: str, *arguments: str) -> Result:
        state = f"state_dir={self.folder / 'state'}"
        command = ["apply", str(self.written(text)), "--set", state, *arguments]
        return CliRunner().invoke(cli, command, prog_name="expertmesh")

    def undo(self) -> Result:
        return CliRunner().invoke(cli, ["apply", "--undo", "--name", "changed"], prog_name="expertmesh")

    def answers(self) -> tuple[np.ndarray, np.ndarray, int]:
        with Client(name="changed") as client:
            eventually(lambda: client.health() == "SERVING", 60, "all replicas are ready, however slow the machine")
            return client.forward("waves", X), client.forward("linear", X), client.status()["epoch"]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "home"))
    for name in ("EXPERTMESH_TOKEN", "EXPERTMESH_NAME"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    for version in ("", "_v2"):
        save_module(tmp_path / f"e0{version}.safetensors", nn.Linear(4, 2))
        gate = gates.build("top_k", in_features=4, num_experts=2, k=2)
        save_module(tmp_path / f"gate{version}.safetensors", gate)
    return Running(tmp_path)


def test_swaps_are_made_once_taken_back_and_outlive_a_restart(running: Running) -> None:
    with running.start(MESH):
        before = running.answers()
        assert np.allclose(before[0], 0.5 * np.sin(X) + 0.5 * np.cos(X), atol=1e-6)
        made = running.apply(OTHER)
        assert made.exit_code == 0, made.output
        assert made.stderr.splitlines() == ["1/1 swap linear, waves: done"]
        after = running.answers()
        assert np.allclose(after[0], 0.75 * np.sin(X) + 0.25 * np.cosh(X), atol=1e-6)
        assert not np.allclose(after[1], before[1])
        assert after[2] == before[2] + 1
        assert running.apply(OTHER).output == "nothing to do\n"
        back = running.undo()
        assert back.exit_code == 0, back.output
        undone = running.answers()
        assert (np.array_equal(undone[0], before[0]), np.array_equal(undone[1], before[1])) == (True, True)
        assert running.apply(MESH).output == "nothing to do\n"
        assert running.apply(OTHER).exit_code == 0
    running.written(OTHER)
    with running.start(OTHER):
        again = running.answers()
        assert (np.array_equal(again[0], after[0]), np.array_equal(again[1], after[1])) == (True, True)
        assert running.apply(OTHER).output == "nothing to do\n"


def test_replicas_are_scaled_and_scaled_back(running: Running) -> None:
    def replicas() -> dict[str, int]:
        with Client(name="changed") as client:
            experts = client.status()["layers"]["waves"]["experts"]
            declared: dict[str, int] = client.declared()["replicas"]
        assert {id: len(expert["replicas"]) for id, expert in experts.items()}.items() <= declared.items()
        return declared

    scaled = OTHER.replace('{factory: "numpy:sin"}', '{factory: "numpy:sin", replicas: 3}')
    with running.start(MESH):
        before = running.answers(), replicas()
        made = running.apply(scaled)
        assert made.exit_code == 0, made.output
        assert made.stderr.splitlines() == ["1/2 swap linear, waves: done", "2/2 scale waves/sin: done"]
        assert replicas()["waves/sin"] == 3
        assert running.apply(scaled).output == "nothing to do\n"
        assert running.undo().exit_code == 0
        assert replicas() == before[1]
        assert np.array_equal(running.answers()[0], before[0][0])


def test_a_refused_swap_changes_nothing_and_is_made_once_the_file_is_right(running: Running) -> None:
    broken = {"weight": torch.full((2, 4), float("nan")), "bias": torch.zeros(2)}
    save_tensors(running.folder / "bad.safetensors", broken)
    only = MESH.replace("e0.safetensors", "bad.safetensors")
    with running.start(MESH):
        before = running.answers()
        refused = running.apply(only)
        assert refused.exit_code == 1
        assert "NaN" in refused.stderr
        assert running.answers()[2] == before[2]
        assert running.apply(MESH).output == "nothing to do\n"
        assert running.apply(OTHER).exit_code == 0


def test_what_cannot_be_done_is_said_and_nothing_else_is_done(running: Running) -> None:
    sizes = OTHER.replace("k: 2", "k: 1")
    live = MESH.replace("port: 0", "port: 0\nretain_epochs: 5")
    with running.start(MESH):
        before = running.answers()
        refused = running.apply(sizes)
        assert refused.exit_code == 1
        said = "swap linear/gate for a gate of another kind or with other arguments"
        assert f"nothing was changed: a running cluster cannot {said}. Restart" in refused.stderr
        assert "what needs a restart is not changed" in running.apply(live).output
        not_allowed = running.apply(MESH.replace('{factory: "numpy:cos"}', '{factory: "numpy:tanh"}'))
        assert "waves/cos with 'numpy:tanh', which is not in its allowed_factories" in not_allowed.stderr
        assert running.answers()[2] == before[2]


def test_versions_that_are_kept_no_more_are_not_gone_back_to(running: Running) -> None:
    with running.start(MESH):
        assert running.apply(OTHER).exit_code == 0
        with Client(name="changed") as client:
            for version in ("", "_v2", ""):
                client.swap({"linear/e0": running.folder / f"e0{version}.safetensors"})
        before = running.answers()
        refused = running.undo()
        assert refused.exit_code == 1
        assert "swap linear/e0 back to v1-" in refused.stderr
        assert "kept no more" in refused.stderr.replace("keeps no more", "kept no more")
        assert running.answers()[2] == before[2]


def test_a_factory_whose_code_was_edited_needs_a_restart(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    code = running.folder / "of_mine.py"
    code.write_text("def doubled(rows):\n    return rows * 2\n")
    monkeypatch.syspath_prepend(str(running.folder))
    text = MESH.replace('factory: "numpy:cos"', 'factory: "of_mine:doubled"')
    with running.start(text):
        assert running.apply(text).output == "nothing to do\n"
        monkeypatch.delitem(__import__("sys").modules, "of_mine")
        code.write_text("def doubled(rows):\n    return rows * 3 - rows + 0\n")
        result = running.apply(text)
        assert result.exit_code == 0, result.output
        assert "what needs a restart is not changed" in result.output
        assert any(line.split()[:3] == ["-", "restart", "waves/cos"] for line in result.output.splitlines())
