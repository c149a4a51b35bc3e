"""docs/training.md is run: each command and each program on the page, against the cluster that it starts."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from expertmesh import Client, Cluster
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.config.loader import load_config

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(line: str) -> str:
    words = shlex.split(line.removeprefix("$ "))
    assert words[0] == "expertmesh"
    result = CliRunner().invoke(cli, words[1:], prog_name="expertmesh")
    assert result.exit_code == 0, result.output
    return result.output


def program(text: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, str(PAGE), "exec"), {})  # noqa: S102 (our own page)
    return said.getvalue()


def table(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    y = (x[:, :3] + x[:, 3:6]).argmax(dim=1)
    header = ",".join([*(f"f{n}" for n in range(8)), "label"])
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    lines = [",".join([*(f"{value:.4f}" for value in row), "abc"[label]]) for row, label in pairs]
    path.write_text("\n".join([header, *lines]))


def test_every_block_of_the_page_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "home"))
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    kinds = ["yaml", "console", "python", "yaml", "console", "python", "python"]
    assert [kind for kind, _ in found] == kinds
    mesh, start, loop, train, commands, trainer, tools = (text for _, text in found)
    Path("mesh.yaml").write_text(mesh, encoding="utf-8")
    Path("train.yaml").write_text(train, encoding="utf-8")
    table(Path("rows.csv"))
    assert start == "$ expertmesh serve mesh.yaml\n"
    config = load_config("mesh.yaml", {"transport": "local", "port": 0, "metrics_port": None})
    with Cluster.start(config=config, name=config.name), Client(name="training") as client:
        said = program(loop)
        assert "step 60" in said
        assert "epoch 2:" in said
        served = re.search(r"served: tensor\(([0-9.]+)", said)
        assert served is not None
        assert float(served.group(1)) > 0.6
        here, publishes, sessions = commands.splitlines()
        assert "written: " in run(here)
        assert "published as epoch 3" in run(publishes)
        run(sessions)
        assert client.training_sessions() == []
    assert "joint" in program(trainer)
    said = program(tools)
    assert len(re.findall(r"before", said)) >= 4
