"""S10: the translation runs whole on real Ray, at small size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("babel")
pytest.importorskip("sacrebleu")
pytest.importorskip("tokenizers")

from expertmesh.cluster.applications.result import Job
from expertmesh.examples import translation

pytestmark = pytest.mark.ray


def test_s10_translation_runs_whole_and_a_second_run_does_not_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    job = Job(seed=0, folder=tmp_path, small=True, tell=told.append)
    result = translation.run(job)
    update = result.update
    assert update.ok
    assert (update.failed, update.mixed) == (0, 0)
    assert update.epochs == 2
    assert len(update.versions) == 2
    assert all(id.startswith("decoder0/e") and "-" in version for id, version in update.versions.items())
    names = [own.model for own in result.models]
    assert names[0] == "sparse layers, top-2 of 4, as served"
    assert len(names) == len(set(names)) == 3 + 4
    for own in result.models:
        assert list(own.quality) == ["BLEU", "chrF"]
        assert all(0 <= value <= 100 and math.isfinite(value) for value in own.quality.values())
        assert own.flops > 0
        assert 0 < own.active <= own.parameters
    sparse, active, total = result.models[:3]
    assert sparse.active == pytest.approx(active.parameters, rel=0.01)
    assert sparse.parameters == pytest.approx(total.parameters, rel=0.01)
    assert all(own.rows_per_second and own.seconds for own in (sparse, active, total))
    assert len(result.lines) == 10

    def again(*_: object) -> None:
        raise AssertionError("it was trained again")

    size = translation.Size.of(translation.SMALL_PAIRS, True)
    corpus = translation.Corpus.of(translation.pairs_of(job), held=size.held, vocabulary=size.vocabulary, seed=0)
    monkeypatch.setattr("expertmesh.examples.data.corpus.Batches.loss", again)
    for name, own in zip(translation.MODELS, (sparse, active, total), strict=True):
        assert translation.train(translation.model_of(size, name, 0), corpus, size, job, name) == own.seconds
