"""S11 on real Ray: the images application runs whole at small size, and goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from expertmesh.cluster.applications.comparison import compare
from expertmesh.cluster.applications.result import Job
from expertmesh.examples import images

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.timeout(300)
def test_s11_images_runs_whole(tmp_path: Path) -> None:
    told: list[str] = []
    comparison = compare(images.run, "images", [0], Job(seed=0, folder=tmp_path, small=True, tell=told.append))
    result = comparison.results[0]
    assert comparison.ok
    assert (result.update.failed, result.update.mixed) == (0, 0)
    assert len(result.update.versions) == 2
    assert all(version.startswith("v2-") for version in result.update.versions.values())
    assert comparison.models[1:3] == ("dense, equal active parameters", "dense, equal total parameters")
    assert len(comparison.models) == 3 + 4
    figures = [model.quality["accuracy"] for model in result.models]
    assert all(math.isfinite(figure) and 0 <= figure <= 1 for figure in figures)
    sparse, active, total = result.models[:3]
    assert sparse.active <= active.parameters < sparse.parameters <= total.parameters
    assert all(model.rows_per_second and model.seconds and model.flops for model in result.models[:3])
    assert all((tmp_path / "seed-0" / name).is_file() for name in result.pictures)
    again = compare(images.run, "images", [0], Job(seed=0, folder=tmp_path, small=True))
    assert again.results == comparison.results


def test_s11_a_training_that_ended_is_not_done_again(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job(seed=0, folder=tmp_path, small=True, tell=told.append)
    data = images.read(job)
    _, experts, seconds = images.train(job, data)
    _, again, same = images.train(job, data)
    assert seconds == same
    for name, expert in experts.items():
        for key, tensor in expert.state_dict().items():
            assert tensor.equal(again[name].state_dict()[key])
