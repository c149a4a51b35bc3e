"""Edits of layers, as pure decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.cluster.config.layer_changes import LayerEdit, edited
from expertmesh.cluster.rpc.changes import ADD, REMOVE
from expertmesh.experts.errors import ExpertMeshError, InvalidRequest, NotFound
from expertmesh.experts.spec import Autoscale, Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer


def of(*names: str) -> dict[str, Expert]:
    return {name: Expert("numpy:sin") for name in names}


def gate(count: int) -> gates.Gate:
    return gates.Fixed([1.0] * count)


LAYERS = {
    "l": Layer("l", gate(2), of("a", "b"), shared=of("s")),
    "m": Layer("m", gate(1), {"p": Expert("numpy:sin", pack="q")}),
}


def after(edit: LayerEdit, name: str = "l") -> Layer:
    return edited(LAYERS, {name: edit})[name]


def test_experts_come_last_or_where_the_order_says() -> None:
    assert [*after(LayerEdit(experts=of("c"), gate=gate(3))).experts] == ["a", "b", "c"]
    ordered = LayerEdit(experts=of("c"), gate=gate(3), order=("c", "a", "b"))
    assert [*after(ordered).experts] == ["c", "a", "b"]


def test_experts_go_and_come_in_one_edit() -> None:
    changed = after(LayerEdit(experts=of("c"), remove=("a", "s"), gate=gates.Fixed([2.0, 3.0])))
    assert ([*changed.experts], [*changed.shared]) == (["b", "c"], [])
    assert changed.gate.config() == {"weights": [2.0, 3.0], "k": None}
    assert LAYERS["l"].experts.keys() == {"a", "b"}


def test_a_shared_expert_needs_no_gate() -> None:
    assert [*after(LayerEdit(shared=of("t"))).shared] == ["s", "t"]


def test_a_gate_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    gates.Fixed([1.0, 2.0, 3.0]).save(path)
    assert after(LayerEdit(experts=of("c"), gate=path)).gate.config()["weights"] == [1.0, 2.0, 3.0]


def test_layers_come_and_go() -> None:
    layer = Layer("n", gate(1), of("x"), on_missing="renormalize", input=TensorSpec((3,)), shared=of("y"))
    found = edited(LAYERS, {"n": LayerEdit.of(layer), "m": LayerEdit(kind=REMOVE)})
    assert [*found] == ["l", "n"]
    assert found["n"] == layer


def test_policies_and_rules_of_scaling_change() -> None:
    rule = Autoscale(max=3)
    changed = after(LayerEdit(settings={"on_missing": "renormalize"}, autoscale={"a": rule}))
    assert changed.on_missing == "renormalize"
    assert {name: expert.autoscale for name, expert in changed.everyone.items()} == {"a": rule, "b": None, "s": None}
    assert after(LayerEdit(autoscale={"q": rule}), "m").experts["p"].autoscale == rule


@pytest.mark.parametrize(
    ("name", "edit", "kind", "message"),
    [
        ("l", LayerEdit(experts=of("c")), InvalidRequest, "picks among 2 experts, and there will be 3"),
        ("l", LayerEdit(experts=of("c"), gate=gate(2)), InvalidRequest, "picks among 2 experts, but the layer has 3"),
        ("l", LayerEdit(remove=("a",)), InvalidRequest, "picks among 2 experts, and there will be 1"),
        ("l", LayerEdit(remove=("a", "b"), gate=gate(1)), InvalidRequest, "it has no experts"),
        ("l", LayerEdit(remove=("x",), gate=gate(1)), NotFound, "no expert 'x'"),
        ("l", LayerEdit(experts=of("a"), gate=gate(3)), InvalidRequest, "has an expert 'a' already"),
        ("l", LayerEdit(shared=of("b")), InvalidRequest, "has an expert 'b' already"),
        ("l", LayerEdit(experts=of("gate"), gate=gate(3)), InvalidRequest, 'no expert may be called "gate"'),
        ("l", LayerEdit(experts=of("layer"), gate=gate(3)), InvalidRequest, 'no expert may be called "layer"'),
        ("l", LayerEdit(order=("a",)), InvalidRequest, "order must name each of its experts once: a, b"),
        ("l", LayerEdit(order=("a", "b", "b")), InvalidRequest, "order must name each of its experts once"),
        ("l", LayerEdit(settings={"combine": "sum"}), InvalidRequest, "combine must be one of"),
        ("l", LayerEdit(autoscale={"z": None}), NotFound, "no expert or pack 'z'"),
        ("l", LayerEdit(gate=Path("nowhere.safetensors")), ExpertMeshError, "nowhere"),
        ("l", LayerEdit(kind=ADD, experts=of("a"), gate=gate(1)), InvalidRequest, "there is a layer 'l' already"),
        ("n", LayerEdit(kind=ADD, experts=of("a")), InvalidRequest, "layer n: it needs a gate"),
        ("n", LayerEdit(experts=of("c")), NotFound, "no layer 'n'"),
        ("n", LayerEdit(kind=REMOVE), NotFound, "no layer 'n'; known are l, m"),
    ],
)
def test_what_cannot_be_is_refused(name: str, edit: LayerEdit, kind: type[ExpertMeshError], message: str) -> None:
    with pytest.raises(kind, match=message):
        edited(LAYERS, {name: edit})


def test_the_last_layer_stays() -> None:
    with pytest.raises(InvalidRequest, match="a cluster needs a layer"):
        edited(LAYERS, {name: LayerEdit(kind=REMOVE) for name in LAYERS})
    one = {"l": replace(LAYERS["l"])}
    with pytest.raises(InvalidRequest, match="a cluster needs a layer"):
        edited(one, {"l": LayerEdit(kind=REMOVE)})
