"""docs/scaling.md is run: each command and each program on the page, against the cluster that it starts."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster, gates
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.config.loader import load_config, parse_override

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BLOCK = re.compile(r"^```(\w+)( skip)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return [(kind, text) for kind, skip, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if not skip]


def commands(kind_and_text: tuple[str, str]) -> list[list[str]]:
    kind, text = kind_and_text
    return [shlex.split(line[2:]) for line in text.splitlines()] if kind == "console" else []


def run(words: list[str]) -> Result:
    assert words[0] == "expertmesh"
    result = CliRunner().invoke(cli, words[1:], prog_name="expertmesh")
    assert result.exit_code == 0, result.output
    return result


def program(text: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, str(PAGE), "exec"), {})  # noqa: S102 (our own page)
    return said.getvalue()


def replicas(cluster: Cluster) -> dict[str, int]:
    names = [name.partition("#")[0] for name in cluster.status()["replicas"]]
    return {name: names.count(name) for name in names}


def layers(cluster: Cluster) -> dict[str, list[str]]:
    with Client(name=cluster.config.name) as client:
        found = client.status()["layers"]
    return {name: [id.partition("/")[2] for id in layer["experts"]] for name, layer in found.items()}


def test_every_command_of_the_page_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "home"))
    (_, mesh), start, scaled, by_program, came, coming, status, asked, applied = blocks()
    more = mesh.replace("[0.5, 0.5]", "[0.25, 0.25, 0.5]") + '      tan: {factory: "numpy:tan"}\n'
    Path("more.yaml").write_text(more + more.partition("layers:\n")[2].replace("waves", "ripples"), encoding="utf-8")
    gates.Fixed([0.5, 0.5]).save("gate.safetensors")
    Path("mesh.yaml").write_text(mesh, encoding="utf-8")
    Path("changed.yaml").write_text(mesh.replace("numpy:cos", "numpy:tanh").replace('sin"}', 'sin", replicas: 3}'))
    (serve,) = commands(start)
    assert serve[:3] == ["expertmesh", "serve", "mesh.yaml"]
    overrides = dict(parse_override(word) for word in serve[3:] if "=" in word)
    config = load_config("mesh.yaml", {**overrides, "metrics_port": None})
    with Cluster.start(config=config, name=config.name) as cluster:
        up, both = commands(scaled)
        run(up)
        assert replicas(cluster) == {"waves/sin": 3, "waves/cos": 1}
        run(both)
        assert replicas(cluster) == {"waves/sin": 1, "waves/cos": 2}
        assert "'before': 1, 'after': 2" in program(by_program[1])
        assert replicas(cluster) == {"waves/sin": 2, "waves/cos": 1}
        add, remove, add_layer, remove_layer = commands(came)
        for words, experts in (
            (add, {"waves": ["sin", "cos", "tan"]}),
            (remove, {"waves": ["sin", "cos"]}),
            (add_layer, {"waves": ["sin", "cos"], "ripples": ["sin", "cos", "tan"]}),
            (remove_layer, {"waves": ["sin", "cos"]}),
        ):
            run(words)
            assert layers(cluster) == experts
        assert "'after': ['sin', 'cos', 'tan']" in program(coming[1])
        assert layers(cluster) == {"waves": ["sin", "cos"]}
        (shown,) = commands(status)
        assert {"router-0", "router-1"} <= set(re.findall(r"router-\d", run(shown).output))
        assert "0.69" in program(asked[1])  # (sin 1 + cos 1) / 2
        dry, carry, again, undo = commands(applied)
        before = cluster.status()["versions"]
        run(dry)
        assert cluster.status()["versions"] == before
        run(carry)
        assert cluster.status()["versions"]["waves/cos"] != before["waves/cos"]
        assert replicas(cluster) == {"waves/sin": 3, "waves/cos": 1}
        assert "nothing" in run(again).output
        run(undo)
        assert replicas(cluster) == {"waves/sin": 2, "waves/cos": 1}
        assert cluster.status()["versions"]["waves/cos"].endswith(before["waves/cos"].partition("-")[2])
