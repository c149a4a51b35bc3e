"""A version is told by what its expert computes, and not by where or how often it runs."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh import Autoscale, Expert
from expertmesh.cluster.control.candidate_records import declared_digest, origin_of


@pytest.mark.parametrize(
    "placed",
    [
        {"replicas": 3},
        {"autoscale": Autoscale(min=1, max=4)},
        {"num_gpus": 1.0},
        {"num_cpus": 2.0},
        {"resources": {"zone": 1.0}},
        {"pack": "p"},
    ],
)
def test_where_and_how_often_an_expert_runs_is_no_part_of_its_version(placed: dict[str, Any]) -> None:
    plain, elsewhere = (Expert("torch.nn:Linear", args=(2, 3), **more) for more in ({}, placed))
    assert origin_of(elsewhere) == origin_of(plain)
    assert declared_digest(elsewhere) == declared_digest(plain)
    assert declared_digest(Expert("torch.nn:Linear", args=(3, 2), **placed)) != declared_digest(plain)
