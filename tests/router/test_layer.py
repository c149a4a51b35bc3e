"""Layer declarations: which ones are rejected, and the ids of a layer's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from expertmesh.experts.errors import ConfigError, InvalidRequest
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer, check_name

SIN, COS = Expert("torch:sin"), Expert("torch:cos")
BASE: dict[str, Any] = {"name": "news", "gate": gates.Fixed([0.5, 0.5]), "experts": {"a": SIN, "b": COS}}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a name with a slash": ({"name": "a/b"}, r"layer name 'a/b' must be 1 to 64 letters"),
    "no name": ({"name": ""}, "layer name '' must be"),
    "a long name": ({"name": "x" * 65}, "must be 1 to 64"),
    "a name of another type": ({"name": 3}, "layer name 3 must be"),
    "a hidden name": ({"name": ".a"}, "not starting with '-' or '.'"),
    "a name with a newline": ({"name": "a\n"}, "must be 1 to 64"),
    "no gate": ({"gate": None}, "layer news: gate must be one of expertmesh.gates, not NoneType"),
    "no experts": ({"experts": {}}, "layer news: it has no experts"),
    "too few experts": ({"experts": {"a": SIN}}, "the gate picks among 2 experts, but the layer has 1"),
    "a bad expert name": ({"experts": {"a": SIN, "b c": COS}}, "layer news: expert name 'b c'"),
    "an expert called gate": ({"experts": {"a": SIN, "gate": COS}}, 'no expert may be called "gate"'),
    "no expert": (
        {"experts": {"a": SIN, "b": torch.cos}},
        "expert b must be an Expert, not builtin.*Expert.from_funct",
    ),
    "a module": ({"experts": {"a": SIN, "b": torch.nn.Tanh()}}, "expert b must be an Expert.*Expert.from_module"),
    "a text": ({"experts": {"a": SIN, "b": "torch:cos"}}, r'must be an Expert, not str; write Expert\("torch:cos"\)'),
    "a list of experts": (
        {"experts": [SIN, COS]},
        "layer news: experts must be a map of names to experts, .* not list",
    ),
    "a list of shared experts": (
        {"shared": [SIN]},
        "layer news: shared must be a map of names to experts, .* not list",
    ),
    "an unknown combine": ({"combine": "median"}, "combine must be one of weighted_sum, .*, not 'median'"),
    "too much lost mass": ({"max_lost_mass": 1.5}, "must lie between 0 and 1, not 1.5"),
    "lost mass that is no number": ({"max_lost_mass": float("nan")}, "must lie between 0 and 1"),
    "an unknown policy": ({"on_missing": "ignore"}, "layer news: on_missing is 'ignore', but must be"),
    "a fallback without a name": ({"on_missing": "fallback:"}, "on_missing is 'fallback:', but must be"),
    "a fallback to an unknown expert": (
        {"on_missing": "fallback:c"},
        r"^layer news: the fallback 'c' is not one of the experts of layer news$",
    ),
    "rows as votes": ({"combine": "vote", "on_missing": "residual"}, "no meaning for combine 'vote'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_declarations_are_rejected(case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        Layer(**{**BASE, **change})


def test_ids_are_in_the_gates_order() -> None:
    layer = Layer(**{**BASE, "experts": {"z": SIN, "a": COS}})
    assert layer.expert_ids == ("news/z", "news/a")
    assert layer.gate_id == "news/gate"


def test_a_request_may_have_its_own_policy() -> None:
    layer = Layer(**BASE)
    assert str(layer.policy("fallback:b")) == "fallback:b"
    with pytest.raises(InvalidRequest, match="fallback 'c'"):
        layer.policy("fallback:c")


def test_a_layer_without_live_objects_has_placeholders() -> None:
    rows = torch.ones(1, 2)
    live = Layer(**{**BASE, "experts": {"a": Expert.from_function(torch.neg), "b": COS}})
    away = live.without_live_objects()
    assert away.experts["a"].ephemeral
    with pytest.raises(ConfigError, match="runs in its replica, not here"):
        away.experts["a"].live(rows)
    assert away.experts["b"] is COS
    assert live.experts["a"].live is torch.neg
    assert replace(away, experts=live.experts) == live


@pytest.mark.parametrize("name", ["a", "A-1", "_x", "9", "a.b", "x" * 64])
def test_valid_names_are_accepted(name: str) -> None:
    check_name(name, "layer")
