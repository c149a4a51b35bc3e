"""`expertmesh add` and `expertmesh remove`, against a cluster in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from expertmesh import Client, Cluster, gates
from expertmesh.cluster.cli.changes.layers import with_one
from expertmesh.cluster.cli.main import cli
from expertmesh.experts.errors import InvalidRequest, NotFound

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
ROWS = {"shape": [3], "dtype": "float32"}
SIN, COS, TAN = ({"factory": f"numpy:{name}"} for name in ("sin", "cos", "tan"))
WAVES = {"gate": {"type": "fixed", "weights": [1, 2]}, "input": ROWS, "experts": {"a": SIN, "c": COS}}
THREE = {"gate": {"type": "fixed", "weights": [1, 2, 3]}, "input": ROWS, "experts": {"a": SIN, "b": TAN, "c": COS}}
MORE = {"gate": {"type": "fixed", "weights": [4]}, "input": ROWS, "experts": {"x": {**SIN, "replicas": 2}}}


def written(path: Path, layers: object) -> Path:
    mesh = {"name": "adds", "port": 0, "metrics_port": None, "transport": "local", "layers": layers,
            "allowed_factories": ["numpy:tan", "numpy:sin"]}  # fmt: skip
    path.write_text(yaml.safe_dump(mesh, sort_keys=False), encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture
def cluster(own_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name in ("EXPERTMESH_TOKEN", "EXPERTMESH_NAME"):
        monkeypatch.delenv(name, raising=False)
    with Cluster.from_config(written(tmp_path / "mesh.yaml", {"waves": WAVES}), state_dir=tmp_path / "s") as started:
        yield started


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="expertmesh")


def test_an_expert_comes_where_the_file_has_it_and_goes(cluster: Cluster, tmp_path: Path) -> None:
    other = written(tmp_path / "other.yaml", {"waves": THREE, "more": MORE})
    added = run("add", other, "waves/b")
    assert added.exit_code == 0, added.output
    assert "a, c" in added.stdout
    assert "a, b, c" in added.stdout
    assert "added in " in added.stdout
    with Client(name="adds") as client:
        np.testing.assert_allclose(client.forward("waves", X), np.sin(X) + 2 * np.tan(X) + 3 * np.cos(X), atol=1e-6)
        assert [*client.status()["layers"]] == ["waves"]
        gates.Fixed([5.0, 6.0]).save(tmp_path / "gate.safetensors")
        removed = run("remove", "waves/a", "--gate", tmp_path / "gate.safetensors", "--name", "adds", "-o", "json")
        assert json.loads(removed.stdout)["layers"] == {"waves": {"before": ["a", "b", "c"], "after": ["b", "c"]}}
        np.testing.assert_allclose(client.forward("waves", X), 5 * np.tan(X) + 6 * np.cos(X), atol=1e-6)


def test_a_layer_comes_and_goes(cluster: Cluster, tmp_path: Path) -> None:
    other = written(tmp_path / "other.yaml", {"waves": THREE, "more": MORE})
    assert json.loads(run("add", other, "more", "-o", "json").stdout)["layers"] == {
        "more": {"before": [], "after": ["x"]}
    }
    with Client(name="adds") as client:
        np.testing.assert_allclose(client.forward("more", X), 4 * np.sin(X), atol=1e-6)
        assert client.declared()["replicas"] == {"more/x": 2, "waves/a": 1, "waves/c": 1}
    gone = run("remove", "more", "--name", "adds")
    assert gone.exit_code == 0, gone.output
    assert run("apply", tmp_path / "mesh.yaml", "--set", f"state_dir={tmp_path / 's'}").output == "nothing to do\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("add", "other.yaml", "waves/z"), 1, "the file declares no expert 'waves/z'; it has more/x, waves/a"),
        (("add", "other.yaml", "waves/a"), 1, "waves/a runs already"),
        (("add", "other.yaml", "waves"), 1, "waves runs already"),
        (("add", "other.yaml", "more/x"), 1, "the cluster has no layer 'more': add it first"),
        (("add", "nowhere.yaml", "waves/b"), 1, "nowhere.yaml"),
        (("remove", "waves/a", "--name", "adds"), 1, "give its new gate with the change"),
        (("remove", "waves", "--name", "adds"), 1, "a cluster needs a layer"),
        (("remove", "none/x", "--name", "adds"), 1, "there is no layer 'none'; known are waves"),
        (("remove", "waves", "--gate", "g.safetensors", "--name", "adds"), 2, "leave --gate out"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "other.yaml", {"waves": THREE, "more": MORE})
    before = cluster.status()["epoch"]
    refused = run(*arguments)
    assert (refused.exit_code, message in refused.stderr) == (code, True), refused.output
    assert cluster.status()["epoch"] == before


def test_one_expert_of_a_file_is_added_to_what_runs() -> None:
    names: dict[str, dict[str, list[str]]] = {"l": {"experts": ["x", "y"], "shared": []}}
    wanted_names = {"l": {"experts": ["v", "x", "w", "y"], "shared": []}}
    empty: dict[str, dict[str, object]] = {name: {} for name in ("settings", "policies", "gates", "autoscale")}
    places = {f"l/{name}": {"group": f"l/{name}"} for name in "vwxy"}
    experts = {f"l/{name}": {"digest": name} for name in "vwxy"}
    runs = {**empty, "layers": names, "experts": {id: experts[id] for id in ("l/x", "l/y")},
            "places": {id: places[id] for id in ("l/x", "l/y")}, "replicas": {"l/x": 3, "l/y": 1}}  # fmt: skip
    wanted = {**empty, "layers": wanted_names, "experts": experts, "places": places,
              "replicas": dict.fromkeys(places, 1), "gates": {"l/gate": {"digest": "g"}}}  # fmt: skip
    for name, order in (("w", ["x", "w", "y"]), ("v", ["v", "x", "y"])):
        found = with_one(runs, wanted, f"l/{name}")
        assert found["layers"]["l"]["experts"] == order
        assert found["experts"].keys() == {"l/x", "l/y", f"l/{name}"}
        assert found["replicas"] == {"l/x": 3, "l/y": 1, f"l/{name}": 1}
        assert found["gates"] == {"l/gate": {"digest": "g"}}
    with pytest.raises(InvalidRequest):
        with_one(runs, wanted, "l/x")
    with pytest.raises(NotFound):
        with_one(runs, wanted, "m")
