"""What reports measure, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.transform.measure import OutputError, median_seconds, output_error, parameters
from expertmesh.experts.transform.report import Change, Report


@dataclass(frozen=True, kw_only=True)
class Example(Report):
    kind: str
    size: Change
    share: Change
    parts: Mapping[str, Change]
    error: float | None = None


def test_the_error_is_relative_where_that_is_defined() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert output_error(one, zero) == OutputError(1.0, 1.0)
    assert output_error(zero, zero) == OutputError(0.0, 0.0)
    assert output_error(zero, one) == OutputError(None, 1.0)
    assert output_error(zero[:0], zero[:0]) == OutputError(0.0, 0.0)
    with pytest.raises(SpecMismatch, match=r"shape \[2, 3\] cannot be compared with answers of shape \[1, 3\]"):
        output_error(zero[:1], zero)


def test_timed_calls_take_turns_after_one_that_only_warms_up() -> None:
    called: list[str] = []
    assert len(median_seconds([lambda: called.append("a"), lambda: called.append("b")], 2)) == 2
    assert called == ["a", "b"] * 3
    with pytest.raises(ConfigError, match="repeats is 0, but must be at least 1"):
        median_seconds([], 0)


def test_a_parameter_counts_once() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.weight = first.weight
    assert parameters(first, second, first) == 6 + 3 + 3


def test_a_report_is_a_table_and_a_dictionary() -> None:
    report = Example(
        kind="x", size=Change(12345, 7), share=Change(None, 0.123456), parts={"a.weight": Change(1, 2)}, error=0.25
    )
    assert str(report).splitlines() == [
        "kind x, error 0.25",
        "                 before   after",
        "size             12,345       7",
        "share                 -  0.1235",
        "parts: a.weight       1       2",
    ]
    assert report.as_dict()["parts"] == {"a.weight": {"before": 1, "after": 2}}
    assert report.as_dict()["share"] == {"before": None, "after": 0.123456}
