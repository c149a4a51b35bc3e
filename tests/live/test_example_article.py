"""The flow of the article at small size, on real Ray: both branches, served, updated under requests, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.cluster.applications.result import Job
from expertmesh.cluster.demo.text import standard_library
from expertmesh.examples.article import SMALL, preprocessed, run, sub_models

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_home", "nothing_left")]


def test_s13_article_runs_both_branches_and_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job(seed=0, folder=tmp_path / "seed-0", small=True, tell=told.append, options={"sparse_from": "0.9"})
    job.folder.mkdir()
    first = run(job)
    names = [model.model for model in first.models]
    assert names[:2] == [
        "sub-models that share, top-2 of 4, as served",
        "fewer dimensions, split, top-2 of 4, as served",
    ]
    assert names[2:4] == ["dense, equal active parameters, as served", "dense, equal parameters, as served"]
    assert len(names) == 4 + SMALL.experts
    taken, _, active, total = first.models[:4]
    assert abs(active.active - taken.active) < 0.1 * taken.active
    assert abs(total.parameters - taken.parameters) < 0.1 * taken.parameters
    for model in first.models:
        assert all(0 <= figure <= 1 for figure in model.quality.values())
        assert model.flops > 0
    assert all(model.rows_per_second and model.seconds for model in first.models[:4])
    assert first.update.ok
    assert first.update.failed == first.update.mixed == 0
    assert {"sub-models/e0", "sub-models/common", "sub-models/gate"} <= first.update.versions.keys()
    assert "the flow takes sub-models" in first.lines[0]
    assert f"{SMALL.common} units shared" in first.lines[1]

    assert any("step" in line for line in told)
    told.clear()
    data = preprocessed(standard_library(), SMALL, job.seed)
    again = sub_models(job, data, SMALL)
    assert told == []  # it was trained before
    assert again.told == first.lines[1:2]
