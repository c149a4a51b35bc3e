"""Plans of change: the steps from one file to another, their order, and that they lead there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.config.loader import load_config
from expertmesh.cluster.owner.wanted import wanted_document
from expertmesh.cluster.placement.change_plan import ORDER, SECTIONS, Document, Plan, plan_changes, resumed
from expertmesh.experts.errors import Aborted, ConfigError, DataLoss


def document_of(folder: Path, text: str) -> Document:
    path = folder / "mesh.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return wanted_document(load_config(path, environ={}))


def steps_of(plan: Plan) -> list[tuple[str, str]]:
    return [(step.kind, step.subject) for step in plan.steps]


def changed(plan: Plan) -> list[str]:
    """What each step changes, and the changes for a restart, as text."""
    lines = [f"{step.kind}: {', '.join(f'{c.section} {c.key}' for c in step.changes)}" for step in plan.steps]
    return lines + [f"restart: {change.section} {change.key}" for change in plan.restarts]


TWO = """\
layers:
  a:
    gate: {type: fixed, weights: [0.5, 0.5]}
    experts:
      sin: {factory: "numpy:sin"}
      cos: {factory: "numpy:cos"}
"""
THREE = TWO.replace("[0.5, 0.5]", "[0.5, 0.3, 0.2]") + '      tan: {factory: "numpy:tan"}\n'
OTHER = """\
  b:
    gate: {type: top_k, in_features: 4, num_experts: 2, k: 1}
    input: {shape: [4]}
    experts:
      e0: {factory: "torch.nn:Linear", args: [4, 2], pack: p, replicas: 2}
      e1: {factory: "torch.nn:Linear", args: [4, 2], pack: p, replicas: 2}
"""
SCALED = TWO.replace('"numpy:sin"', '"numpy:sin", replicas: 2, autoscale: {max: 4}')

PAIRS = {
    "nothing": (TWO, TWO, []),
    "an expert is added with its gate": (
        TWO,
        THREE,
        ["add_expert: layers a, gates a/gate, experts a/tan, places a/tan, replicas a/tan"],
    ),
    "an expert is removed with its gate": (
        THREE,
        TWO,
        ["remove_expert: layers a, gates a/gate, experts a/tan, places a/tan, replicas a/tan"],
    ),
    "one is added and another removed, with one gate": (
        THREE,
        THREE.replace("tan: {factory", "exp: {factory").replace("numpy:tan", "numpy:exp"),
        ["change_experts: layers a, experts a/exp, experts a/tan, places a/exp, places a/tan, replicas a/exp, "
         "replicas a/tan"],
    ),
    "a layer is added": (
        TWO,
        TWO + OTHER,
        ["add_layer: layers b, policies b, gates b/gate, experts b/e0, experts b/e1, places b/e0, places b/e1, "
         "replicas b/p"],
    ),
    "a layer takes the place of another": (
        TWO,
        "layers:\n" + OTHER,
        ["add_layer: layers b, policies b, gates b/gate, experts b/e0, experts b/e1, places b/e0, places b/e1, "
         "replicas b/p",
         "remove_layer: layers a, policies a, gates a/gate, experts a/cos, experts a/sin, places a/cos, places a/sin, "
         "replicas a/cos, replicas a/sin"],
    ),
    "experts and packs are scaled": (
        TWO + OTHER,
        (TWO + OTHER).replace('"numpy:sin"', '"numpy:sin", replicas: 3').replace("replicas: 2", "replicas: 1"),
        ["scale: replicas a/sin", "scale: replicas b/p"],
    ),
    "an expert and its gate are declared anew": (
        TWO,
        TWO.replace("numpy:sin", "numpy:tanh").replace("[0.5, 0.5]", "[0.7, 0.3]"),
        ["swap: gates a/gate, experts a/sin"],
    ),
    "a policy names an expert that comes": (
        TWO,
        THREE.replace("    gate:", '    on_missing: "fallback:tan"\n    gate:'),
        ["add_expert: layers a, gates a/gate, experts a/tan, places a/tan, replicas a/tan", "set: policies a"],
    ),
    "a policy names an expert that goes": (
        THREE.replace("    gate:", '    on_missing: "fallback:tan"\n    gate:'),
        TWO,
        ["set: policies a", "remove_expert: layers a, gates a/gate, experts a/tan, places a/tan, replicas a/tan"],
    ),
    "what is to be scaled by its load keeps its number": (
        TWO.replace('"numpy:sin"', '"numpy:sin", replicas: 3'),
        SCALED,
        ["autoscale: autoscale a/sin"],
    ),
    "what is scaled by its load no more has the number of the file": (
        SCALED.replace("replicas: 2", "replicas: 4"),
        TWO,
        ["autoscale: autoscale a/sin", "scale: replicas a/sin"],
    ),
    "settings, and where an expert runs": (
        TWO,
        "default_timeout: 5\nport: 1\n" + TWO.replace('"numpy:sin"', '"numpy:sin", num_cpus: 1, replicas: 2'),
        ["set: settings default_timeout", "restart: settings port", "restart: places a/sin", "restart: replicas a/sin"],
    ),
    "another order, which is the gate's": (
        THREE,
        TWO.replace("sin: {factory", "x: {factory").replace("cos: {factory", "sin: {factory").replace("x: {", "cos: {"),
        ["restart: layers a", "restart: gates a/gate", "restart: experts a/cos", "restart: experts a/sin",
         "restart: experts a/tan", "restart: places a/tan", "restart: replicas a/tan"],
    ),
    "other rows": (
        TWO + OTHER,
        TWO + OTHER.replace("[4, 2]", "[3, 2]").replace("features: 4", "features: 3").replace("[4]}", "[3]}"),
        ["restart: layers b", "restart: gates b/gate", "restart: experts b/e0", "restart: experts b/e1"],
    ),
}  # fmt: skip


def without_restarts(wanted: Document, plan: Plan, runs: Document) -> dict[str, dict[str, Any]]:
    """What is wanted, but for what only a restart brings, and replicas that follow their load."""
    target = {section: dict(wanted[section]) for section in SECTIONS}
    for change in plan.restarts:
        target[change.section].pop(change.key, None)
        if change.before is not None:
            target[change.section][change.key] = change.before
    for group in target["autoscale"].keys() & runs["replicas"].keys() & target["replicas"].keys():
        target["replicas"][group] = runs["replicas"][group]
    return target


def check_plan(runs: Document, wanted: Document, live: tuple[str, ...]) -> Plan:
    """A plan leads to what is wanted, a second one has nothing to do, and undone it leads back."""
    plan = plan_changes(runs, wanted, live=live)
    after = plan.carried_out(runs)
    assert after == without_restarts(wanted, plan, runs)
    again = plan_changes(after, wanted, live=live)
    assert (again.steps, again.restarts) == ((), plan.restarts)
    assert plan.undone().carried_out(after) == runs
    document = runs
    for number, step in enumerate(plan.steps):  # stopped before any of its steps, it is continued and undone
        assert plan.remaining(document) == plan.steps[number:]
        assert resumed(plan, document, wanted, live=live) == plan
        assert plan.undone().carried_out(document) == runs
        document = step.carried_out(document)
    assert plan.remaining(after) == ()
    assert plan.undone().undone() == Plan(plan.steps)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    return plan


@pytest.mark.parametrize("pair", PAIRS)
def test_the_plan_between_two_files(tmp_path: Path, pair: str) -> None:
    runs, wanted, expected = PAIRS[pair]
    plan = check_plan(document_of(tmp_path, runs), document_of(tmp_path, wanted), ("default_timeout",))
    assert changed(plan) == expected


def test_weights_that_were_moved_are_the_same_weights(tmp_path: Path) -> None:
    runs = document_of(tmp_path, TWO)
    moved = {**runs, "experts": {id: {**expert, "weights": "/elsewhere"} for id, expert in runs["experts"].items()}}
    assert plan_changes(runs, moved) == Plan()


def test_a_wrong_file_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mesh\.yaml:5: .*sinn"):
        document_of(tmp_path, TWO.replace("numpy:sin", "numpy:sinn"))


def test_the_same_steps_have_the_same_digest_and_others_another(tmp_path: Path) -> None:
    two, three = document_of(tmp_path, TWO), document_of(tmp_path, THREE)
    plan = plan_changes(two, three)
    assert plan.digest == plan_changes(two, three).digest != plan_changes(three, two).digest
    assert plan.undone().digest == plan_changes(three, two).digest


def test_a_step_is_made_once_and_only_on_what_it_was_planned_for(tmp_path: Path) -> None:
    two, three = document_of(tmp_path, TWO), document_of(tmp_path, THREE)
    (step,) = plan_changes(two, three).steps
    assert not step.is_done(two)
    after = step.carried_out(two)
    assert step.is_done(after)
    assert step.carried_out(after) == after
    changed = {**two, "gates": {"a/gate": {"type": "fixed", "digest": "x"}}}
    with pytest.raises(Aborted, match=r"add_expert a: a/gate \(gates\) has changed since .*: plan again"):
        step.carried_out(changed)


def test_a_plan_that_leads_elsewhere_is_not_continued(tmp_path: Path) -> None:
    two, three = document_of(tmp_path, TWO), document_of(tmp_path, THREE)
    other = document_of(tmp_path, TWO.replace("numpy:sin", "numpy:tanh"))
    assert resumed(plan_changes(two, three), two, other) == plan_changes(two, other)
    assert resumed(plan_changes(other, three), two, other) == plan_changes(two, other)
    assert resumed(plan_changes(two, three), three, three) == Plan()


def test_a_plan_that_was_altered_is_refused(tmp_path: Path) -> None:
    plain = plan_changes(document_of(tmp_path, TWO), document_of(tmp_path, THREE)).to_json()
    for wrong in ({**plain, "digest": "0" * 64}, {**plain, "steps": []}, {"digest": plain["digest"]}, {"steps": 3}):
        with pytest.raises(DataLoss, match="cannot be read"):
            Plan.from_json(wrong)


groups = st.fixed_dictionaries(
    {
        "digest": st.sampled_from("xyz"),
        "shared": st.booleans(),
        "pack": st.sampled_from(["", "", "p", "q"]),
        "gpus": st.sampled_from([0, 0, 1]),
    }
)
layers = st.fixed_dictionaries(
    {
        "experts": st.dictionaries(st.sampled_from(["e0", "e1", "e2", "e3"]), groups, min_size=1),
        "replicas": st.integers(1, 3),
        "autoscale": st.sampled_from([None, None, {"max": 3}, {"max": 4}]),
        "gate": st.sampled_from("gh"),
        "policy": st.sampled_from(["error", "renormalize"]),
        "input": st.sampled_from([1, 1, 1, 2]),
    }
)
clusters = st.tuples(
    st.dictionaries(st.sampled_from(["a", "b"]), layers, min_size=1),
    st.dictionaries(st.sampled_from(["port", "default_timeout"]), st.integers(1, 2)),
)


def built(cluster: tuple[Mapping[str, Any], Mapping[str, int]]) -> Document:
    document: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    declared, settings = cluster
    document["settings"] |= settings
    for name, layer in declared.items():
        lists = {key: [e for e, x in layer["experts"].items() if x["shared"] == (key == "shared")] for key in
                 ("experts", "shared")}  # fmt: skip
        document["layers"][name] = {**lists, "input": layer["input"]}
        document["policies"][name] = {"on_missing": layer["policy"]}
        document["gates"][f"{name}/gate"] = {"digest": layer["gate"]}
        for expert, plain in layer["experts"].items():
            group = f"{name}/{plain['pack'] or expert}"
            document["experts"][f"{name}/{expert}"] = {"digest": plain["digest"]}
            document["places"][f"{name}/{expert}"] = {"group": group, "num_gpus": plain["gpus"]}
            document["replicas"][group] = layer["replicas"]
            if layer["autoscale"]:
                document["autoscale"][group] = layer["autoscale"]
    return document


@given(clusters, clusters)
def test_any_plan_leads_there_and_back(
    runs: tuple[Mapping[str, Any], Mapping[str, int]], wanted: tuple[Mapping[str, Any], Mapping[str, int]]
) -> None:
    plan = check_plan(built(runs), built(wanted), ("default_timeout",))
    places = [ORDER.index(step.kind) for step in plan.steps]
    assert places == sorted(places)
    keys = [(change.section, change.key) for step in plan.steps for change in step.changes]
    assert len(keys) == len(set(keys))


@given(clusters)
def test_nothing_is_to_be_done_where_nothing_differs(cluster: tuple[Mapping[str, Any], Mapping[str, int]]) -> None:
    assert plan_changes(built(cluster), built(cluster)) == Plan()
