"""What an expert's declaration refuses, and how rows are compared with a spec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.spec import ANY, FLOATING, Autoscale, Expert, TensorSpec
from expertmesh.experts.wire import ITEM_SIZES

shapes = st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple)
specs = st.builds(TensorSpec, shapes, st.none() | st.sampled_from(sorted(ITEM_SIZES)))


@pytest.mark.parametrize("shape", ["12", b"12", 5, [-1], [1.0], [True], [None], {1, 2}])
def test_shapes_that_are_none(shape: Any) -> None:
    with pytest.raises(ConfigError, match="shape must be a list of sizes"):
        TensorSpec(shape)


def test_a_list_becomes_a_tuple_and_an_unknown_dtype_is_named() -> None:
    assert TensorSpec([2, 3]).shape == (2, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'float8' is not known; use one of float64"):
        TensorSpec(dtype="float8")


@given(specs, specs)
def test_agreement_is_mutual_and_means_that_rows_of_one_pass_the_other(one: TensorSpec, other: TensorSpec) -> None:
    assert one.agrees(other) == other.agrees(one)
    assert one.agrees(ANY)
    if other.shape is None or other.dtype is None:
        return
    try:
        one.check(other.shape, other.dtype, "rows")
    except SpecMismatch:
        assert not one.agrees(other)
    else:
        assert one.agrees(other)


@pytest.mark.parametrize("mine", FLOATING)
@pytest.mark.parametrize("theirs", FLOATING)
def test_floating_dtypes_stand_for_each_other_and_integers_for_none(mine: str, theirs: str) -> None:
    TensorSpec((2,), mine).check((2,), theirs, "x")
    with pytest.raises(SpecMismatch, match=f"x has dtype int64, expected {mine}"):
        TensorSpec((2,), mine).check((2,), "int64", "x")
    with pytest.raises(SpecMismatch, match=r"x has rows of shape \[2\], expected \[3\]"):
        TensorSpec((3,), mine).check((2,), theirs, "x")


class Text:
    """What stands for any class."""


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither factory nor object": ({}, "needs a factory"),
    "both": ({"factory": "torch:sin", "live": abs}, "needs a factory"),
    "no colon": ({"factory": "torch.sin"}, "module:attribute"),
    "two colons": ({"factory": "a:b:c"}, "module:attribute"),
    "not a name": ({"factory": "os:system('x')"}, "module:attribute"),
    "empty half": ({"factory": ":sin"}, "module:attribute"),
    "a number": ({"factory": 3}, "module:attribute"),
    "no replicas": ({"factory": "a:b", "replicas": 0}, "replicas must be a whole number"),
    "half a replica": ({"factory": "a:b", "replicas": 1.5}, "replicas must be a whole number"),
    "a true replica": ({"factory": "a:b", "replicas": True}, "replicas must be a whole number"),
    "less than no GPU": ({"factory": "a:b", "num_gpus": -1}, "num_gpus must be a number"),
    "GPUs that are no number": ({"factory": "a:b", "num_gpus": float("nan")}, "num_gpus must be a number"),
    "endless GPUs": ({"factory": "a:b", "num_gpus": float("inf")}, "num_gpus must be a number"),
    "one and a half GPUs": ({"factory": "a:b", "num_gpus": 1.5}, "above 1 must be whole"),
    "CPUs as text": ({"factory": "a:b", "num_cpus": "2"}, "num_cpus must be a number"),
    "a true CPU": ({"factory": "a:b", "num_cpus": True}, "num_cpus must be a number"),
    "a function": ({"factory": lambda rows: rows}, "make an expert of this function with Expert.from_function"),
    "a module": ({"factory": torch.nn.Tanh()}, "make an expert of this module with Expert.from_module"),
    "a class": ({"factory": Text}, r'Expert.from_module\(Text\(...\)\), or write Expert\(".*test_spec:Text"'),
    "a live class": ({"live": Text}, "a live expert is an object, not a class; pass an object of it"),
    "args as text": ({"factory": "a:b", "args": "16"}, "args must be a list of arguments"),
    "one arg": ({"factory": "a:b", "args": 16}, "args must be a list of arguments"),
    "kwargs as a list": ({"factory": "a:b", "kwargs": [1]}, "kwargs must be a map of names to arguments"),
    "another framework": ({"factory": "a:b", "framework": "jax"}, 'framework must be "torch" or "numpy"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_declarations_that_cannot_be_right(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        Expert(**arguments)


def test_only_live_objects_are_ephemeral_and_they_stay_out_of_a_repr() -> None:
    assert not Expert("torch:sin").ephemeral
    live = Expert.from_function(lambda rows: rows, replicas=2)
    assert live.ephemeral
    assert "lambda" not in repr(live)
    with pytest.raises(ConfigError, match="needs a function, not int"):
        Expert.from_function(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a module, not int"):
        Expert.from_module(3)
    for made in (Expert.from_module, Expert.from_function):
        with pytest.raises(ConfigError, match=r"not a class; .*Expert\.from_module\(Tanh\(\.\.\.\)\)"):
            made(torch.nn.Tanh)


def test_numbers_of_numpy_are_taken_as_those_of_python() -> None:
    made = Expert(
        "torch.nn:Linear",
        args=(np.int64(4), [np.float32(0.5)]),
        kwargs={"sizes": {"a": (np.int8(1), True)}, "text": np.str_("t"), "table": np.ones(2), "zero": np.array(3.0)},
        replicas=np.int64(2),  # type: ignore[arg-type]
        num_gpus=np.float64(0.5),
    )
    assert repr(made.args) == "(4, [0.5])"
    assert repr({**made.kwargs, "table": 0, "zero": 0})[:39] == "{'sizes': {'a': (1, True)}, 'text': 't'"
    assert isinstance(made.kwargs["table"], np.ndarray)
    assert isinstance(made.kwargs["zero"], np.ndarray)
    assert (type(made.replicas), type(made.num_gpus)) == (int, float)


@pytest.mark.parametrize(
    "other",
    [
        {"num_gpus": 1},
        {"num_cpus": 2},
        {"replicas": 2},
        {"autoscale": Autoscale(max=2)},
        {"resources": {"tpu": 1}},
        {"runtime_env": {"env_vars": {"A": "1"}}},
    ],
)
def test_placement_tells_different_places_apart(other: dict[str, Any]) -> None:
    assert Expert("torch:sin").placement() == Expert("torch:cos", pack="p").placement()
    assert Expert("torch:sin").placement() != Expert("torch:sin", **other).placement()


def test_placement_does_not_depend_on_the_order_of_what_is_asked_for() -> None:
    one = Expert("torch:sin", resources={"a": 1, "b": 2}, runtime_env={"x": 1, "y": 2})
    other = Expert("torch:sin", resources={"b": 2, "a": 1}, runtime_env={"y": 2, "x": 1})
    assert one.placement() == other.placement()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max": 0}, "max must be a whole number of at least 1, not 0"),
        ({"max": True}, "max must be a whole number"),
        ({"max": 2, "min": 3}, "min must not be above max"),
        ({"max": 2, "target_queue_ms": 0}, "target_queue_ms must be a number above 0"),
        ({"max": 2, "up_after": float("nan")}, "up_after must be"),
        ({"max": 2, "down_after": float("inf")}, "down_after must be"),
    ],
)
def test_a_wrong_autoscale_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Autoscale(**wrong)


def test_replicas_start_within_what_autoscale_allows() -> None:
    assert Expert("torch:sin", autoscale=Autoscale(min=2, max=4)).replicas == 2
    assert Expert("torch:sin", replicas=3, autoscale=Autoscale(min=2, max=4)).replicas == 3
    with pytest.raises(ConfigError, match="replicas is 5, and autoscale allows 4"):
        Expert("torch:sin", replicas=5, autoscale=Autoscale(max=4))
    with pytest.raises(ConfigError, match=r"an expertmesh\.Autoscale, not dict"):
        Expert("torch:sin", autoscale={"max": 4})  # type: ignore[arg-type]
