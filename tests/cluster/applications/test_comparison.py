"""An application over seeds: each runs once, whatever is interrupted, and the table has means and spreads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertmesh.cluster.applications.comparison import Comparison, compare, figure_of
from expertmesh.cluster.applications.live_update import LiveUpdate
from expertmesh.cluster.applications.plots import plot_comparison
from expertmesh.cluster.applications.result import Job, Measured, Result
from expertmesh.experts.errors import ConfigError, FailedPrecondition

UPDATE = LiveUpdate(requests=9, failed=0, mixed=0, epochs=2, versions={"l/e0": "v2-a"}, before=0.5, after=0.6)


def result(seed: int) -> Result:
    sparse = Measured(
        model="sparse", quality={"accuracy": 0.5 + seed / 10, "F1": 0.4}, parameters=100, active=20, flops=40.0,
        seconds=2.0, rows_per_second=1000.0 + seed,
    )  # fmt: skip
    dense = Measured(model="dense", quality={"accuracy": 0.4, "F1": 0.3}, parameters=20, active=20, flops=40.0)
    return Result(models=(sparse, dense), update=UPDATE, lines=("a line",))


def test_each_seed_runs_once(tmp_path: Path) -> None:
    ran: list[int] = []

    def application(job: Job) -> Result:
        assert job.folder.is_dir()
        if job.seed == 2 and len(ran) < 3:
            ran.append(job.seed)
            raise KeyboardInterrupt
        ran.append(job.seed)
        return result(job.seed)

    job = Job(seed=0, folder=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        compare(application, "it", [0, 1, 2], job)
    first = compare(application, "it", [0, 1, 2], job)
    assert ran == [0, 1, 2, 2]
    assert compare(application, "it", [0, 1, 2], job) == first
    assert ran == [0, 1, 2, 2]
    assert first.results == {seed: result(seed) for seed in range(3)}


def test_a_folder_has_results_of_one_question(tmp_path: Path) -> None:
    compare(lambda job: result(0), "it", [0], Job(seed=0, folder=tmp_path, small=True))
    with pytest.raises(ConfigError, match="has results of other data or options"):
        compare(lambda job: result(0), "it", [0], Job(seed=0, folder=tmp_path))
    with pytest.raises(ConfigError, match="has results of other data or options"):
        compare(lambda job: result(0), "it", [0], Job(seed=0, folder=tmp_path, small=True, options={"k": "v"}))


def test_a_seed_that_failed_leaves_no_result(tmp_path: Path) -> None:
    def failing(job: Job) -> Result:
        raise FailedPrecondition("the loss is nan")

    with pytest.raises(FailedPrecondition):
        compare(failing, "it", [0], Job(seed=0, folder=tmp_path))
    assert not list(tmp_path.rglob("result.json"))


def test_what_is_refused_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    def refusing(job: Job) -> Result:
        raise ConfigError("bad.csv:3: the label is missing")

    bad, good = Job(seed=0, folder=tmp_path / "new", data=tmp_path / "bad.csv"), Job(seed=0, folder=tmp_path / "new")
    with pytest.raises(ConfigError, match=r"bad\.csv:3"):
        compare(refusing, "it", [0], bad)
    assert not bad.folder.exists()
    good.folder.mkdir()  # the user's own, which stays
    with pytest.raises(ConfigError, match=r"bad\.csv:3"):
        compare(refusing, "it", [0], bad)
    assert list(good.folder.iterdir()) == []
    assert compare(lambda job: result(0), "it", [0], good).ok
    with pytest.raises(ConfigError, match="has results of other data or options"):
        compare(refusing, "it", [0], bad)
    assert (good.folder / "seed-0" / "result.json").is_file()


def test_what_an_interrupted_seed_had_begun_is_kept(tmp_path: Path) -> None:
    def interrupted(job: Job) -> Result:
        (job.folder / "checkpoint.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(interrupted, "it", [0], Job(seed=0, folder=tmp_path / "new"))
    assert (tmp_path / "new" / "seed-0" / "checkpoint.safetensors").is_file()


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    comparison = Comparison("it", {seed: result(seed) for seed in range(3)})
    assert comparison.ok
    assert str(comparison.quality("sparse", "accuracy")) == "0.6 ± 0.1"
    assert comparison.columns()[:3] == ["model", "held-out accuracy", "held-out F1"]
    assert comparison.rows() == [
        ["sparse", "0.6 ± 0.1", "0.4", 20, 100, 40, 2.0, 1001],
        ["dense", "0.4", "0.3", 20, 20, 40, None, None],
    ]
    assert json.loads(json.dumps(comparison.as_dict()))["results"]["1"]["update"]["requests"] == 9
    plot_comparison(comparison, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("failed", "mixed", "versions"), [(1, 0, {"a": "v"}), (0, 1, {"a": "v"}), (0, 0, {})])
def test_an_update_that_failed_or_mixed_or_published_nothing_is_told(
    failed: int, mixed: int, versions: dict[str, str]
) -> None:
    update = LiveUpdate(requests=9, failed=failed, mixed=mixed, epochs=2, versions=versions, before=0.5, after=0.6)
    assert not update.ok


def test_one_seed_has_no_spread() -> None:
    assert str(figure_of([0.25])) == "0.25"
    assert str(figure_of([1.0, 3.0])) == "2 ± 1.4"
