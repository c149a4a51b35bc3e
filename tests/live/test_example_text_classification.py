"""The classification of texts at small size, on real Ray: trained, served, updated under requests, and resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from expertmesh.cluster.applications.result import Job
from expertmesh.examples.text_classification import SMALL, accuracy, rows_of, run, train_sparse

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_home", "nothing_left")]


def test_s10_text_classification_runs_whole_and_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job(seed=0, folder=tmp_path / "seed-0", small=True, tell=told.append)
    job.folder.mkdir()
    first = run(job)
    names = [model.model for model in first.models]
    assert names[0] == f"sparse layer, top-{SMALL.k} of {SMALL.experts}, as served"
    assert names[1:3] == ["dense, equal active parameters", "dense, equal parameters"]
    assert len(names) == 3 + SMALL.experts
    sparse, active, total = first.models[:3]
    assert abs(active.active - sparse.active) < 0.1 * sparse.active
    assert abs(total.parameters - sparse.parameters) < 0.1 * sparse.parameters
    for model in first.models:
        assert all(0 <= figure <= 1 for figure in model.quality.values())
        assert model.flops > 0
    assert all(model.rows_per_second and model.seconds for model in first.models[:3])
    assert first.update.ok
    assert first.update.failed == first.update.mixed == 0
    assert len(first.update.versions) == 2
    assert all(id.startswith("text/e") for id in first.update.versions)
    assert math.isfinite(first.update.after)
    assert (job.folder / first.pictures[0]).is_file()
    assert len(first.lines) == 5

    assert any("epoch" in line for line in told)
    told.clear()
    data, texts = rows_of(job, SMALL)
    again = train_sparse(job, data, SMALL)
    assert told == []  # it was trained before
    found = accuracy(again.local(data.held_x).detach(), data.held_y)
    assert found == pytest.approx(sparse.quality["accuracy"], abs=1.5 / len(texts))
