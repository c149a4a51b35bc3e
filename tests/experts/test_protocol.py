"""Records from untrusted maps: exactly the fields, exactly the types."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import InvalidRequest
from expertmesh.experts.protocol import CallOptions, CallSummary, from_mapping

ids = st.lists(st.text(max_size=8), max_size=4)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.text(max_size=40),
    "top_k": st.integers(1, 64),
    "allow": ids,
    "deny": ids,
    "on_missing": st.sampled_from(["error", "renormalize", "residual", "fallback:e0"]),
    "max_lost_mass": st.floats(0, 1) | st.integers(0, 1),
    "return_routing": st.booleans(),
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.fixed_dictionaries({"layer": st.text()}, optional=OPTIONS))
@settings(max_examples=60, deadline=None)
def test_options_come_back_as_they_were(values: dict[str, Any]) -> None:
    options = from_mapping(CallOptions, values)
    assert {name: getattr(options, name) for name in values} == values


@given(values=st.dictionaries(st.sampled_from(["layer", *OPTIONS, "other"]), anything, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_map_is_a_record_or_an_invalid_request(values: dict[str, Any]) -> None:
    try:
        options = from_mapping(CallOptions, values)
    except InvalidRequest:
        pass
    else:
        assert isinstance(options.layer, str)
        assert options.top_k is None or type(options.top_k) is int
        assert options.max_lost_mass is None or math.isfinite(options.max_lost_mass)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "layer is missing"),
        ({"layer": "a", "lyer": "b"}, "unknown field 'lyer'"),
        ({"layer": 1}, "field layer"),
        ({"layer": None}, "field layer"),
        ({"layer": "a", "top_k": True}, "field top_k"),
        ({"layer": "a", "top_k": 1.0}, "field top_k"),
        ({"layer": "a", "return_routing": 1}, "field return_routing"),
        ({"layer": "a", "return_routing": None}, "field return_routing"),
        ({"layer": "a", "allow": "news/e0"}, "field allow"),
        ({"layer": "a", "allow": ["news/e0", 1]}, "field allow"),
        ({"layer": "a", "deny": [["news/e0"]]}, "field deny"),
        ({"layer": "a", "max_lost_mass": math.nan}, "field max_lost_mass"),
        ({"layer": "a", "max_lost_mass": math.inf}, "field max_lost_mass"),
        ({"layer": "a", "max_lost_mass": True}, "field max_lost_mass"),
        ({"layer": "a", "max_lost_mass": "0.5"}, "field max_lost_mass"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        from_mapping(CallOptions, values)


def test_a_summary_needs_its_fields_and_checks_its_maps() -> None:
    least = {"request_id": "r", "epoch": 1, "versions": {"news/e0": "v1-3fa1c2d40b9e"}}
    summary = from_mapping(CallSummary, least)
    assert (summary.degraded, summary.missing, summary.max_lost_mass, summary.dropped) == (False, [], 0.0, 0)
    for name in least:
        with pytest.raises(InvalidRequest, match=f"{name} is missing"):
            from_mapping(CallSummary, {key: value for key, value in least.items() if key != name})
    with pytest.raises(InvalidRequest, match="versions"):
        from_mapping(CallSummary, least | {"versions": {"news/e0": 1}})
    with pytest.raises(InvalidRequest, match="versions"):
        from_mapping(CallSummary, least | {"versions": {1: "v1"}})


def test_defaults_are_not_shared_between_records() -> None:
    first = CallSummary(request_id="a", epoch=1, versions={})
    second = CallSummary(request_id="b", epoch=1, versions={})
    assert first.missing is not second.missing


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("name", ["epoch", "min_epoch", "max_lost_mass"])
def test_a_number_beyond_64_bits_is_no_number_of_a_record(name: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be a number of at most 64 bits"):
        from_mapping(CallOptions, {"layer": "l", name: value})
    assert from_mapping(CallOptions, {"layer": "l", "epoch": 2**63 - 1}).epoch == 2**63 - 1
