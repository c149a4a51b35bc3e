"""S12 on real Ray: the modalities application runs whole at small size, flags what is missing, and goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from expertmesh.cluster.applications.comparison import compare
from expertmesh.cluster.applications.result import Job
from expertmesh.examples import modalities

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.timeout(300)
def test_s12_modalities_runs_whole(tmp_path: Path) -> None:
    told: list[str] = []
    comparison = compare(modalities.run, "modalities", [0], Job(seed=0, folder=tmp_path, small=True, tell=told.append))
    result = comparison.results[0]
    assert comparison.ok
    assert (result.update.failed, result.update.mixed) == (0, 0)
    assert len(result.update.versions) == 2
    assert all(version.startswith("v2-") for version in result.update.versions.values())
    assert comparison.models[1:3] == ("dense, equal active parameters", "dense, equal total parameters")
    assert len(comparison.models) == 3 + 4
    figures = [figure for model in result.models for figure in model.quality.values()]
    assert all(math.isfinite(figure) and 0 <= figure <= 1 for figure in figures)
    sparse, active, total = result.models[:3]
    assert sparse.active <= active.parameters < sparse.parameters <= total.parameters
    assert all(model.rows_per_second and model.seconds and model.flops for model in result.models[:3])
    both, image, text, neither = result.lines
    assert "flagged" not in both
    assert "flagged: modalities/text" in image
    assert "flagged: modalities/image" in text
    assert "refused, InvalidRequest" in neither
    assert (
        compare(modalities.run, "modalities", [0], Job(seed=0, folder=tmp_path, small=True)).results
        == comparison.results
    )


def test_s12_a_training_that_ended_is_not_done_again(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job(seed=0, folder=tmp_path, small=True, tell=told.append)
    data = modalities.read(job)
    _, experts, seconds = modalities.train(job, data)
    _, again, same = modalities.train(job, data)
    assert seconds == same
    for name, expert in experts.items():
        for key, tensor in expert.state_dict().items():
            assert tensor.equal(again[name].state_dict()[key])
