"""`expertmesh apply` adds, changes and removes experts and layers of a running cluster, and takes that back exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers.waiting import eventually
from torch import nn

from expertmesh import Client, Cluster
from expertmesh.cluster.cli.main import cli
from expertmesh.experts.weights.files import save_module, save_tensors
from expertmesh.router import gates

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
ROWS = {"shape": [4], "dtype": "float32"}
SIN, COS, TAN = ({"factory": f"numpy:{name}"} for name in ("sin", "cos", "tan"))


def fixed(*weights: float) -> dict[str, object]:
    return {"type": "fixed", "weights": [*weights]}


WAVES = {"gate": fixed(0.5, 0.25), "input": ROWS, "experts": {"a": SIN, "b": COS}}
DENSE = {"factory": "torch.nn:Linear", "args": [4, 4]}
LINEAR = {"gate": fixed(1.0), "input": ROWS, "experts": {"e": {**DENSE, "weights": "e.safetensors"}}}
BEFORE = {"waves": WAVES, "linear": LINEAR}


def waves(gate: dict[str, object], **experts: object) -> dict[str, object]:
    return {**WAVES, "gate": gate, "experts": {**WAVES["experts"], **experts}}  # type: ignore[dict-item]


def linear(gate: dict[str, object], **experts: object) -> dict[str, object]:
    return {**LINEAR, "gate": gate, "experts": {**LINEAR["experts"], **experts}}  # type: ignore[dict-item]


TOP_2 = {"type": "top_k", "in_features": 4, "num_experts": 3, "k": 2, "weights": "gate.safetensors"}
PACKED, RULE = {"pack": "p", "replicas": 2}, {"autoscale": {"min": 1, "max": 3}}
LENIENT = {"on_missing": "renormalize", "max_lost_mass": 0.25}
PAIRS: dict[str, tuple[dict[str, object], list[str]]] = {  # what waves, or all layers, become, and the steps to there
    "an expert comes": ({"waves": waves(fixed(1, 2, 3), c=TAN)}, ["add_expert waves"]),
    "it comes first": (
        {"waves": {**WAVES, "gate": fixed(1, 2, 3), "experts": {"c": TAN, "a": SIN, "b": COS}}},
        ["add_expert waves"],
    ),
    "an expert goes": ({"waves": {**WAVES, "gate": fixed(2), "experts": {"b": COS}}}, ["remove_expert waves"]),
    "one goes and one comes": (
        {"waves": {**WAVES, "gate": fixed(2, 1), "experts": {"b": COS, "c": TAN}}},
        ["change_experts waves"],
    ),
    "an expert with weights comes": (
        {"linear": linear(fixed(1, 2), f={**DENSE, "weights": "f.safetensors"})},
        ["add_expert linear"],
    ),
    "a gate with weights comes": ({"waves": waves(TOP_2, c=TAN)}, ["add_expert waves"]),
    "a shared expert comes": ({"waves": {**WAVES, "shared": {"s": TAN}}}, ["add_expert waves"]),
    "a pack comes": (
        {"waves": waves(fixed(1, 2, 3, 4), c={**TAN, **PACKED}, d={**SIN, **PACKED})},
        ["add_expert waves"],
    ),
    "a layer comes": ({"more": {**WAVES, **LENIENT, "shared": {"s": TAN}}}, ["add_layer more"]),
    "a layer goes": ({"linear": None}, ["remove_layer linear"]),
    "a policy changes": ({"waves": {**WAVES, **LENIENT}}, ["set waves"]),
    "a capacity comes": ({"waves": {**WAVES, "capacity": {"factor": 4.0}}}, ["set waves"]),
    "a rule of scaling comes": ({"waves": waves(fixed(0.5, 0.25), a={**SIN, **RULE})}, ["autoscale waves/a"]),
    "several things at once": (
        {
            "waves": {**waves(fixed(1, 2, 3), c=TAN, b={**COS, "replicas": 2}), **LENIENT},
            "more": LINEAR,
            "linear": None,
        },
        ["add_layer more", "add_expert waves", "set waves", "scale waves/b", "remove_layer linear"],
    ),
}


@dataclass
class Running:
    """A cluster in this process that was started from a file of a folder."""

    folder: Path

    def written(self, layers: object) -> Path:
        path = self.folder / "mesh.yaml"
        mesh = {"name": "relaid", "port": 0, "metrics_port": None, "transport": "local", "layers": layers,
                "allowed_factories": ["numpy:sin", "numpy:cos", "numpy:tan", "torch.nn:Linear"], "retain_epochs": 8,
                "state_dir": str(self.folder / "state")}  # fmt: skip
        path.write_text(yaml.safe_dump(mesh, sort_keys=False), encoding="utf-8")
        path.chmod(0o600)
        return path

    def start(self, layers: object) -> Cluster:
        return Cluster.from_config(self.written(layers))

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments], prog_name="expertmesh")

    def apply(self, layers: object, *arguments: str) -> Result:
        return self.run("apply", str(self.written(layers)), *arguments)

    def seen(self, cluster: Cluster) -> dict[str, object]:
        """The answers of every layer, the versions, and the replicas, once what was taken away has ended."""
        with Client(name="relaid") as client:
            eventually(lambda: client.health() == "SERVING", 60, "all replicas are ready")
            layers = client.status()["layers"]
            answers = {name: client.forward(name, X).tobytes() for name in layers}
            served = {id for layer in layers.values() for id in layer["experts"]}
            there = {f"{name}/gate" for name in layers} | served
            versions = {id: version for id, version in cluster.status()["versions"].items() if id in there}
            document = client.declared()
        kept = {section: document[section] for section in ("replicas", "layers", "policies", "autoscale")}
        return {"answers": answers, "versions": versions, **kept}


@pytest.fixture
def running(own_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    for name in ("EXPERTMESH_TOKEN", "EXPERTMESH_NAME"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    for name in "ef":
        save_module(tmp_path / f"{name}.safetensors", nn.Linear(4, 4))
    save_module(tmp_path / "gate.safetensors", gates.build("top_k", in_features=4, num_experts=3, k=2))
    return Running(tmp_path)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_files(running: Running, pair: str) -> None:
    changed, steps = PAIRS[pair]
    layers = {name: layer for name, layer in {**BEFORE, **changed}.items() if layer is not None}
    with running.start(BEFORE) as cluster:
        before = running.seen(cluster)
        planned = json.loads(running.apply(layers, "--dry-run", "-o", "json").stdout)
        assert [f"{step['kind']} {step['subject']}" for step in planned["steps"]] == steps
        assert running.seen(cluster) == before
        made = running.apply(layers)
        assert made.exit_code == 0, made.output
        assert made.stderr.splitlines() == [f"{n}/{len(steps)} {step}: done" for n, step in enumerate(steps, start=1)]
        after = running.seen(cluster)
        assert after != before
        assert running.apply(layers).output == "nothing to do\n"
        undone = running.run("apply", "--undo", "--name", "relaid")
        assert undone.exit_code == 0, undone.output
        assert running.seen(cluster) == before
        assert running.apply(BEFORE).output == "nothing to do\n"
        assert running.apply(layers).exit_code == 0
        again = running.seen(cluster)
        assert again["answers"] == after["answers"]
    with running.start(layers) as cluster:
        assert running.seen(cluster) == again
        assert running.apply(layers).output == "nothing to do\n"
    with running.start(BEFORE) as cluster:  # what was applied outlives a start from the old file
        assert running.seen(cluster)["answers"] == again["answers"]


def test_trained_weights_come_back_with_an_expert_that_is_taken_back(running: Running) -> None:
    with running.start(BEFORE) as cluster, Client(name="relaid") as client:
        save_tensors(running.folder / "t.safetensors", {"weight": torch.eye(4), "bias": torch.ones(4)})
        client.swap({"linear/e": running.folder / "t.safetensors"})
        before = running.seen(cluster)
        assert running.apply({"waves": WAVES}).exit_code == 0
        assert running.run("apply", "--undo", "--name", "relaid").exit_code == 0
        assert running.seen(cluster)["answers"] == before["answers"]
        np.testing.assert_allclose(client.forward("linear", X), X + 1)


def test_an_undo_that_cannot_be_finished_is_not_begun(running: Running) -> None:
    swapped = {**waves(fixed(1, 2, 3), c=TAN, b=SIN)}
    few = {"retain_epochs": 1}
    with Cluster.from_config(running.written(BEFORE), **few) as cluster:
        state = ["--set", "retain_epochs=1"]
        assert running.apply({"waves": swapped}, *state).exit_code == 0  # adds, swaps, and removes a layer
        before = running.seen(cluster)
        refused = running.run("apply", "--undo", "--name", "relaid")
        assert refused.exit_code == 1
        assert "nothing was changed" in refused.stderr
        assert "keeps no more" in refused.stderr
        assert running.seen(cluster) == before


def test_a_framework_that_is_declared_stays_with_a_swap(running: Running) -> None:
    first = {**WAVES, "experts": {"a": {**SIN, "framework": "numpy"}, "b": COS}}
    second = {**WAVES, "experts": {"a": {**TAN, "framework": "numpy"}, "b": COS}}
    with running.start({"waves": first}):
        for layers in (second, first, second):
            made = running.apply({"waves": layers})
            assert made.exit_code == 0, made.output
            assert running.apply({"waves": layers}).output == "nothing to do\n"
