"""A user's own texts, to be classified: what is wrong is told in one line, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmesh import ConfigError
from expertmesh.cluster.applications.result import Job
from expertmesh.cluster.training.record import EpochResult, TrainingReport
from expertmesh.examples import article, text_classification
from expertmesh.examples.text_classification import accuracy, seconds_of

WORDS = [first + second for first in "abcdefghijkl" for second in "mnopqrstuv"]
ROWS = "".join(f"{'sea' if number % 2 else 'land'},{word} and more words\n" for number, word in enumerate(WORDS))
BAD = {
    "empty": (b"", "the file is empty"),
    "no rows": (b"label,text\n", "0 different texts"),
    "one class": (("label,text\n" + ROWS.replace("sea,", "land,")).encode(), "every row has the label 'land'"),
    "no label": (("topic,text\n" + ROWS).encode(), ":1: there is no column 'label'"),
    "no text": (("label\n" + "sea\nland\n" * 60).encode(), ":1: there is no text column"),
    "encoding": (("label,text\n" + ROWS).encode() + b"sea,caf\xe9 au lait\n", ":122: the text is not utf-8"),
    "wide row": (("label,text\n" + ROWS + "sea,one,two\n").encode(), ":122: the row has 3 columns"),
    "no value": (("label,text\n" + ROWS + ",words without a label\n").encode(), ":122: the row's 'label' is empty"),
    "binary": (("label,text\n" + ROWS).encode() + b"sea,\0\0\n", ":122: holds a NUL character"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("application", [text_classification, article])
def test_bad_data_are_one_line_and_leave_nothing(application: object, what: str, tmp_path: Path) -> None:
    content, wanted = BAD[what]
    path, folder = tmp_path / "rows.csv", tmp_path / "seed-0"
    path.write_bytes(content)
    folder.mkdir()
    with pytest.raises(ConfigError) as raised:
        application.run(Job(seed=0, folder=folder, data=path, small=True))  # type: ignore[attr-defined]
    assert wanted in str(raised.value)
    assert str(raised.value).startswith((str(path), path.name))
    assert "\n" not in str(raised.value)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n" + ROWS + "sea," + "x" * 100_000_000 + "\n")
    with pytest.raises(ConfigError, match=r"rows\.csv:122: not CSV: field larger than field limit"):
        text_classification.run(Job(seed=0, folder=tmp_path, data=path, small=True))


def test_accuracy_is_the_share_of_rows_whose_best_class_is_theirs() -> None:
    answers = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 1.0]])
    assert accuracy(answers, torch.tensor([1, 0, 0, 1])) == 0.5


def test_seconds_count_the_rows_of_each_phase() -> None:
    alone = EpochResult("experts", 1, 1, 1.0, 0.5, 1e-3, rows_per_second=30.0)
    joint = EpochResult("joint", 1, 1, 1.0, 0.5, 1e-3, rows_per_second=10.0)
    report = TrainingReport("accuracy", 0.1, 0.5, (alone, joint), 0.0)
    seen_TE = torch.tensor([[True, True], [True, False]])
    assert seconds_of(report, seen_TE) == pytest.approx(3 / 30 + 2 / 10)
