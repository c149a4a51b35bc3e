"""One text for equal values, different texts for different ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import ConfigError
from expertmesh.experts.identity.canonical import canonical, named, sha256

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text(max_size=3) | st.integers(-3, 3) | st.booleans() | st.none() | st.tuples(st.integers(0, 3))
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=6)


def kinds(value: Any) -> Any:
    """A value in which 1, 1.0 and True differ, as they do for a factory; to compare with."""
    if isinstance(value, (list, tuple)):
        return [kinds(item) for item in value]
    if isinstance(value, dict):
        return {(type(key).__name__, repr(key)): kinds(item) for key, item in value.items()}
    return type(value).__name__, repr(value)


@given(values, values)
@settings(max_examples=400, deadline=None)
def test_equal_texts_are_equal_values(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (kinds(one) == kinds(other))


@given(st.dictionaries(keys, plain, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_a_map_does_not_matter(value: dict[Any, Any], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


DIFFERENT = [
    torch.zeros(2),
    torch.zeros(1, 2),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.tensor([0.0, 1.0]),
    np.zeros(2, np.float32),
    np.float32(0),
    np.float64(0),
    0j,
    frozenset({1, 2}),
    frozenset({1}),
    torch.float32,
    torch.bfloat16,
    torch.device("cpu"),
    np.sin,
    np.cos,
    torch.sin,
    math.sin,
    int,
    float,
    ...,
    [1].append,
    [2].append,
    torch.ones(2).add,
    torch.zeros(2).add,
]


def test_what_is_not_plain_json_has_texts_of_its_own() -> None:
    assert len({canonical(value) for value in DIFFERENT}) == len(DIFFERENT)


def test_tuples_and_lists_are_one_since_a_file_knows_only_lists() -> None:
    assert canonical((1, (2, 3))) == canonical([1, [2, 3]])


@pytest.mark.parametrize("value", [object(), lambda: 0, np.array([object()]), {"a": [object()]}, {object(): 1}])
def test_what_has_no_stable_text_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a version's digest"):
        canonical(value)


def test_what_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="contains itself"):
        canonical(endless)


def test_a_name_carries_the_version_of_its_package() -> None:
    assert named(np.sin) == f"numpy:sin@{np.__version__}"
    assert named(torch.nn.Linear) == f"torch.nn.modules.linear:Linear@{torch.__version__}"
    assert "0x" not in named(object())


@given(st.lists(st.text()), st.lists(st.text()))
def test_texts_are_not_run_together(one: list[str], other: list[str]) -> None:
    assert (sha256(*one) == sha256(*other)) == (one == other)
