"""S10, text generation: the example runs whole on a real Ray, and is not trained twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from expertmesh.cluster.applications.result import Job
from expertmesh.examples import generation
from expertmesh.examples.data.prose import documentation

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_s10_text_generation_runs_whole(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(documentation()[:60_000])
    job = Job(seed=0, folder=tmp_path, data=text, small=True)
    result = generation.run(job)

    update = result.update
    assert update.ok
    assert update.failed == update.mixed == 0
    assert {id: version[:3] for id, version in update.versions.items()} == {f"block1/e{n}": "v2-" for n in range(4)}
    assert math.isfinite(update.before)
    assert math.isfinite(update.after)

    names = [model.model for model in result.models]
    assert names == [
        "sparse layers, top-2 of 4, as served",
        "dense, equal active parameters, as served",
        "dense, equal parameters, as served",
        *(f"expert e{number} alone" for number in range(4)),
    ]
    assert result.lower_is_better
    for model in result.models:
        assert 0 < model.quality["bits per byte"] < 8.5
        assert 0 < model.active <= model.parameters
        assert model.flops > 0
    for model in result.models[:3]:
        assert model.seconds is not None
        assert model.rows_per_second
    assert result.models[0].quality["bits per byte"] == pytest.approx(update.before, abs=1e-3)

    size = generation.SMALL
    model = generation.model_of(size, "sparse", job.seed)
    found = generation.cut(text.read_bytes(), size)
    assert generation.train(model, found.train, size, job, "sparse") == result.models[0].seconds
    assert generation.quality(model, found)["bits per byte"] == pytest.approx(update.before, abs=1e-3)
