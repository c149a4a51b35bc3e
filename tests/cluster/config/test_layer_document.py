"""What a layer is made of, as a document: it comes back, and its digits tell layers apart that serve differently."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.config.layer_document import layer_digest, layer_document, layer_of
from expertmesh.experts.spec import Autoscale, Expert, TensorSpec
from expertmesh.router import gates
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.layer import Layer

NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True)
SPECS = st.sampled_from([TensorSpec(), TensorSpec((3,)), TensorSpec((2, 2), "float16")])
RULES = st.none() | st.builds(Autoscale, max=st.integers(4, 9), min=st.integers(1, 3))


@st.composite
def experts(draw: Any) -> Expert:
    live = draw(st.booleans())
    return Expert(
        None if live else "numpy:sin",
        live=abs if live else None,
        pack=draw(st.sampled_from([None, "p"])),
        output=draw(SPECS),
        autoscale=draw(RULES),
        num_cpus=draw(st.sampled_from([None, 0.5])),
        resources=draw(st.sampled_from([{}, {"zone": 1.0}])),
        runtime_env=draw(st.sampled_from([None, {"pip": ["x"]}])),
    )


@st.composite
def layers(draw: Any) -> Layer:
    routed, shared = draw(NAMES), [f"s{name}" for name in draw(NAMES)]
    return Layer(
        "l",
        gates.Fixed([1.0] * len(routed)),
        {name: draw(experts()) for name in routed},
        shared={name: draw(experts()) for name in shared},
        input=draw(SPECS),
        combine=draw(st.sampled_from(["weighted_sum", "mean"])),
        on_missing=draw(st.sampled_from(["error", "renormalize", f"fallback:{routed[0]}"])),
        max_lost_mass=draw(st.none() | st.floats(0, 1)),
        capacity=draw(st.none() | st.builds(Capacity, factor=st.floats(0.5, 2))),
    )


@given(layers())
def test_a_layer_comes_back_with_all_that_routers_need(layer: Layer) -> None:
    document = json.loads(json.dumps(layer_document(layer), sort_keys=True))
    back = layer_of("l", document)
    assert layer_document(back) == document
    assert layer_digest(back) == layer_digest(layer)
    assert [*back.everyone] == [*layer.everyone]
    assert (back.packs, back.input, back.policy(back.on_missing)) == (
        layer.packs, layer.input, layer.policy(layer.on_missing)
    )  # fmt: skip
    assert [expert.ephemeral for expert in back.everyone.values()] == [e.ephemeral for e in layer.everyone.values()]


LAYER = Layer("l", gates.Fixed([1.0, 1.0]), {"a": Expert("numpy:sin"), "b": Expert("numpy:cos")})


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYER, experts={"b": LAYER.experts["b"], "a": LAYER.experts["a"]}),
        replace(LAYER, experts={"a": LAYER.experts["a"], "c": LAYER.experts["b"]}),
        replace(LAYER, experts={name: replace(expert, pack="p") for name, expert in LAYER.experts.items()}),
        replace(LAYER, shared={"s": Expert("numpy:sin")}),
        replace(LAYER, on_missing="renormalize"),
        replace(LAYER, combine="mean"),
        replace(LAYER, max_lost_mass=0.1),
        replace(LAYER, input=TensorSpec((3,))),
        replace(LAYER, capacity=Capacity(factor=1.0)),
        LAYER.with_experts({**LAYER.experts, "a": replace(LAYER.experts["a"], autoscale=Autoscale(max=2))}),
        LAYER.with_experts({**LAYER.experts, "a": replace(LAYER.experts["a"], output=TensorSpec((3,)))}),
    ],
)
def test_what_changes_an_answer_changes_the_digits(other: Layer) -> None:
    assert layer_digest(other) != layer_digest(LAYER)


def test_what_an_expert_computes_and_where_is_no_part_of_the_layers_version() -> None:
    elsewhere = {name: replace(e, num_cpus=2.0, replicas=3, factory="numpy:tan") for name, e in LAYER.experts.items()}
    assert layer_digest(replace(LAYER, experts=elsewhere, gate=gates.Fixed([2.0, 3.0]))) == layer_digest(LAYER)


def test_an_environment_that_json_cannot_hold_is_left_out() -> None:
    odd = {name: replace(expert, runtime_env={"py_modules": [json]}) for name, expert in LAYER.experts.items()}
    document = layer_document(replace(LAYER, experts=odd))
    assert [expert["place"]["runtime_env"] for _, expert in document["experts"]] == [None, None]
