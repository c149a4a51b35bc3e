"""A staged version against the old one: norms, tensors read back, golden rows, drift."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.construct.factory import RowFunction, build
from expertmesh.experts.errors import ConfigError, DataLoss, FailedPrecondition
from expertmesh.experts.spec import ANY, Expert, TensorSpec
from expertmesh.experts.staging.verify import (
    Policy,
    check_applied,
    check_drift,
    check_norms,
    distance,
    golden_rows,
    probe,
    probe_drift,
)
from expertmesh.experts.weights.inspect import survey

ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)


def function(call: Any, **options: Any) -> RowFunction:
    return build(Expert.from_function(call, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm_ratio": 0.5},
        {"max_norm_ratio": math.nan},
        {"max_norm_ratio": "9"},
        {"allow_norm": "no"},
        {"allow_unverified": 1},
        {"max_drift": -0.1},
        {"max_drift": math.nan},
        {"max_drift": True},
        {"probe_rows": 0},
        {"probe_rows": 2.0},
        {"probe_rows": 10**9},
    ],
    ids=str,
)
def test_bounds_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Policy(**options)


@pytest.mark.parametrize(
    ("new", "old", "fits"),
    [
        (999.0, 1.0, True),
        (1001.0, 1.0, False),
        (1.0, 1001.0, False),
        (5.0, 0.0, True),
        (0.0, 5.0, False),
        (0.0, 0.0, True),
        (math.inf, 1.0, False),
        (1.0, math.inf, False),
        (math.inf, math.inf, True),
    ],
)
def test_a_norm_may_not_leave_its_bound_either_way(new: float, old: float, fits: bool) -> None:
    norms = ({"a": 1.0, "b": new, "only new": 1e9}, {"a": 1.0, "b": old, "only old": 1e-9})
    check_norms(*norms, Policy(allow_norm=True))
    if fits:
        check_norms(*norms, Policy())
        return
    with pytest.raises(
        FailedPrecondition, match=r"the norm of 'b' changed from .* to .*max_norm_ratio is 1000.*allow_norm"
    ):
        check_norms(*norms, Policy())


@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e30)),
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e30)),
)
def test_a_wider_bound_never_refuses_what_a_narrower_one_takes(new: dict[str, float], old: dict[str, float]) -> None:
    def taken(ratio: float) -> bool:
        try:
            check_norms(new, old, Policy(max_norm_ratio=ratio))
        except FailedPrecondition:
            return False
        return True

    assert taken(10) <= taken(1e9)
    assert taken(1.0) or new != old


def test_every_tensor_is_read_back() -> None:
    given = {"weight": torch.ones(2, 2), "bias": torch.arange(2.0), "count": torch.tensor(3)}
    digests = survey(given).digests
    check_applied(given, digests)
    wrong: list[dict[str, Tensor]] = [
        {**given, "bias": torch.zeros(2)},
        {**given, "bias": torch.empty(2, device="meta")},
        {name: value for name, value in given.items() if name != "bias"},
        {**given, "bias": given["bias"] * (1 + 2**-23)},
    ]
    for staged in wrong:
        with pytest.raises(DataLoss, match=r"does not hold what was sent for 'bias': .*fix"):
            check_applied(staged, digests)
    with pytest.raises(DataLoss, match=r"sent for 'x':"):
        check_applied({**given, "x": torch.ones(1)}, digests)
    with pytest.raises(DataLoss, match="sent for 'bias', 'count', 'weight':"):
        check_applied({}, digests)


@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_golden_rows_are_the_same_each_time(dtype: str | None) -> None:
    spec = TensorSpec((2, 3), dtype)
    rows = golden_rows(spec, 5, 7)
    assert rows is not None
    assert rows.shape == (5, 2, 3)
    assert rows.dtype == getattr(torch, dtype or "float32")
    again, other = golden_rows(spec, 5, 7), golden_rows(spec, 5, 8)
    assert again is not None
    assert other is not None
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)
    assert golden_rows(TensorSpec(None, dtype), 5) is None


@pytest.mark.slow
def test_golden_rows_are_the_same_in_every_process() -> None:
    code = (
        "from expertmesh.experts.staging.verify import golden_rows; from expertmesh.experts.spec import TensorSpec;"
        "print(golden_rows(TensorSpec((3,)), 2).flatten().tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    rows = golden_rows(TensorSpec((3,)), 2)
    assert rows is not None
    assert printed.stdout.strip() == str(rows.flatten().tolist())


def test_drift_is_the_relative_distance() -> None:
    double, same = function(lambda rows: rows * 2), function(lambda rows: rows)
    assert probe_drift(double, same, ROWS) == pytest.approx(1.0)
    assert probe_drift(same, double, ROWS) == pytest.approx(0.5)
    assert probe_drift(same, same, ROWS) == 0
    assert probe_drift(same, function(torch.zeros_like), ROWS) == math.inf
    assert probe_drift(function(torch.zeros_like), function(torch.zeros_like), ROWS) == 0
    sign = function(lambda rows: rows.sign().long())
    assert probe_drift(sign, sign, ROWS) == 0


@given(st.floats(-4, 4), st.floats(0.5, 4))
@settings(deadline=None)
def test_drift_does_not_depend_on_scale(by: float, scale: float) -> None:
    old = ROWS.double()
    assert distance(old * (1 + by) * scale, old * scale) == pytest.approx(abs(by), abs=1e-12)


def test_probing_changes_neither_the_rows_nor_the_gradients() -> None:
    before = ROWS.clone()
    probe_drift(function(lambda rows: rows.mul_(2)), function(lambda rows: rows.add_(1)), ROWS)
    assert torch.equal(ROWS, before)


def explodes(rows: Tensor) -> Tensor:
    raise ZeroDivisionError("a secret")


def leaves(rows: Tensor) -> Tensor:
    raise SystemExit(3)


def one_nan(rows: Tensor) -> Tensor:
    return torch.where(rows == rows.max(), torch.nan, rows)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (function(explodes), "it raised ZeroDivisionError on probe rows; see the log"),
        (function(leaves), "it raised SystemExit on probe rows"),
        (function(lambda rows: rows[1:]), "fails on probe rows: the expert returned shape"),
        (function(lambda rows: "text"), "must return a tensor"),
        (
            function(lambda rows: rows[:, :2]),
            r"answers probe rows with \[2\] float32, but the version it replaces has",
        ),
        (function(lambda rows: rows.long()), r"with \[4\] int64, but the version it replaces has \[4\] float32"),
        (function(lambda rows: rows, output=TensorSpec((9,))), r"its declaration has \[9\]"),
        (function(one_nan), "answers 1 of 3 probe rows with NaN or infinity, where the old one does not"),
        (function(lambda rows: rows / 0), "answers 3 of 3 probe rows with NaN"),
    ],
)
def test_what_answers_badly_is_refused(new: RowFunction, words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        probe_drift(new, function(lambda rows: rows), ROWS)
    assert "secret" not in caught.value.message


def test_the_layer_has_a_say_in_what_comes_back() -> None:
    assert probe(function(torch.sin), ROWS, ANY).shape == ROWS.shape
    with pytest.raises(FailedPrecondition, match=r"the layer has \[5\]"):
        probe(function(torch.sin), ROWS, TensorSpec((5,)))


def test_floating_dtypes_may_stand_for_each_other() -> None:
    assert probe_drift(function(lambda rows: rows.double()), function(lambda rows: rows), ROWS) == 0


def test_rows_that_the_old_expert_cannot_answer_do_not_count() -> None:
    assert probe_drift(function(one_nan), function(one_nan), ROWS) == 0
    with pytest.raises(FailedPrecondition, match="none of the probe rows with finite numbers"):
        probe_drift(function(torch.sin), function(lambda rows: rows / 0), ROWS)
    with pytest.raises(FailedPrecondition, match="the serving version cannot be compared: "):
        probe_drift(function(torch.sin), function(explodes), ROWS)


def test_a_bound_on_drift_is_held() -> None:
    check_drift(9.0, Policy())
    check_drift(None, Policy())
    check_drift(0.1, Policy(max_drift=0.1))
    for drift in (0.11, math.inf, math.nan):
        with pytest.raises(FailedPrecondition, match=r"differ by .*max_drift is 0.1.*raise max_drift"):
            check_drift(drift, Policy(max_drift=0.1))
    with pytest.raises(FailedPrecondition, match="declare the expert's input shape"):
        check_drift(None, Policy(max_drift=0.1))
