"""S11, recommendation: the example runs whole on a real Ray, and is not trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.cluster.applications.result import Job
from expertmesh.examples import recommendation
from expertmesh.examples.data.interactions import read_csv

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_s11_recommendation_runs_whole(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    rows = [f"u{user},i{item},{(user * item) % 5}" for user in range(30) for item in range(40) if (user + item) % 3]
    path.write_text("\n".join(["user,item,rating", *rows]), encoding="utf-8")
    job = Job(seed=0, folder=tmp_path, data=path, small=True)
    result = recommendation.run(job)

    assert result.update.ok
    assert result.update.failed == result.update.mixed == 0
    assert {id: version[:3] for id, version in result.update.versions.items()} == {
        f"items/e{number}": "v2-" for number in range(4)
    }
    names = [model.model for model in result.models]
    assert names == [
        "sparse layer, two gates, top-2 of 4, as served",
        "dense, equal active parameters, as served",
        "dense, equal parameters, as served",
        "matrix factorisation, equal parameters",
        *(f"expert e{number} alone" for number in range(4)),
    ]
    for model in result.models:
        assert list(model.quality) == ["AUC of takes", "AUC of likes"]
        assert all(0.0 < figure < 1.0 for figure in model.quality.values())
        assert 0 < model.active <= model.parameters
    for model in result.models[:3]:
        assert model.flops > 0
        assert model.rows_per_second
    assert result.models[0].quality["AUC of takes"] == pytest.approx(result.update.before, abs=1e-4)

    data = read_csv(path)
    known, _, held = recommendation.split(data, job.seed)
    model = recommendation.model_of(data, recommendation.SMALL, "sparse", job.seed)
    seconds = recommendation.train(model, known, recommendation.SMALL, job, "sparse")
    assert seconds == result.models[0].seconds
    assert recommendation.quality(model, held)["AUC of takes"] == pytest.approx(result.update.before, abs=1e-4)
