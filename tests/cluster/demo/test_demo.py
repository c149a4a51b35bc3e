"""The demo without its cluster: text, features, training, and the judge of answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from expertmesh import ConfigError
from expertmesh.cluster.client.reply import Reply
from expertmesh.cluster.demo import run, training
from expertmesh.cluster.demo.features import Dataset, encode, split
from expertmesh.cluster.demo.swaps import Judge
from expertmesh.cluster.demo.text import Corpus, clean, read_csv, standard_library
from expertmesh.cluster.demo.traffic import percentile

TOPICS = {
    "sea": "ship sail wave harbour tide anchor captain storm",
    "garden": "rose soil seed spade bloom hedge root compost",
    "kitchen": "oven flour butter knife recipe simmer pan salt",
    "space": "orbit comet rocket planet lunar probe galaxy launch",
}


def synthetic(rows: int = 2000) -> Corpus:
    """Texts of four topics: six words of the topic's own eight, and one of another's."""
    generator = torch.Generator().manual_seed(0)
    texts, labels = [], []
    for number in range(rows):
        label = number % len(TOPICS)
        words = list(TOPICS.values())[label].split()
        other = list(TOPICS.values())[(label + 1) % len(TOPICS)].split()
        chosen = [words[i] for i in torch.randperm(8, generator=generator)[:6].tolist()]
        texts.append(" ".join([*chosen, other[number % 8], f"filler{'abcdefghij'[number % 10]}"]))
        labels.append(label)
    return Corpus(tuple(texts), tuple(labels), tuple(TOPICS), "synthetic")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    corpus = synthetic()
    return encode(corpus, split(corpus))


@pytest.fixture(scope="module")
def trained(dataset: Dataset) -> training.Trained:
    return training.train(dataset)


@pytest.mark.slow
def test_every_python_carries_enough_text() -> None:
    corpus = standard_library()
    assert len(corpus) >= 2000
    assert len(corpus.names) >= 8
    assert set(corpus.labels) == set(range(len(corpus.names)))
    assert len(set(corpus.texts)) == len(corpus.texts)
    assert standard_library() == corpus


def test_cleaning_takes_markup_and_addresses_away() -> None:
    assert clean("<b>Oil &amp; gas</b> at http://example.org/x rise").lower().split() == [
        "oil",
        "&",
        "gas",
        "at",
        "rise",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,other\nsome words,b\n", "label"),
        ("label,text\na,first words here\na,second words here\n", "at least 100"),
        (
            "label,text\n"
            + "".join(f"a,some words number {n} {chr(97 + n % 26) * 5} {n // 26 * 'x'}y\n" for n in range(200)),
            "two labels",
        ),
        ("", "empty"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "news.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_csv(path)


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"news\.csv"):
        read_csv(tmp_path / "news.csv")


def test_held_out_rows_are_held_out() -> None:
    corpus = synthetic()
    parts = split(corpus)
    assert not set(parts.train) & set(parts.held_out)
    assert sorted([*parts.train, *parts.held_out]) == list(range(len(corpus)))
    assert split(corpus, rows_limit=100).train != parts.train


def test_features_are_fitted_on_training_rows_alone() -> None:
    corpus = synthetic()
    parts = split(corpus)
    texts = list(corpus.texts)
    for position in parts.held_out:
        texts[position] = "unseen words instead of everything"
    changed = encode(replace(corpus, texts=tuple(texts)), parts)
    assert torch.equal(changed.train_x_TD, encode(corpus, parts).train_x_TD)


@pytest.mark.slow
def test_experts_see_their_own_rows_and_learn(dataset: Dataset, trained: training.Trained) -> None:
    seen = trained.seen_TE.float().mean(dim=0)
    assert len(trained.experts) == training.NUM_EXPERTS
    assert bool((seen < 1).all())
    assert bool(trained.seen_TE.any(dim=1).all())
    with torch.inference_mode():
        for expert in trained.experts:
            assert training.accuracy(expert(dataset.held_x_TD), dataset.held_y_T) > 0.9


@pytest.mark.slow
def test_the_dense_model_has_as_many_parameters(trained: training.Trained) -> None:
    dense = training.parameters(trained.dense)
    assert abs(dense - trained.sparse_parameters) / trained.sparse_parameters < 0.02


def reply(trained: training.Trained, x_TD: torch.Tensor, version: str, change: float = 0.0) -> Reply:
    """What a cluster would answer that serves these experts under one version."""
    with torch.inference_mode():
        routing = trained.gate(x_TD)
        weights = torch.zeros(len(x_TD), len(trained.experts)).scatter(1, routing.indices_TK, routing.weights_TK)
        answers = torch.stack([expert(x_TD) for expert in trained.experts], dim=1)
        output = (answers * weights[:, :, None]).sum(dim=1) + change
    ids = [f"text/e{number}" for number in range(len(trained.experts))] + ["text/gate"]
    return Reply(
        output=output,
        epoch=1,
        versions=dict.fromkeys(ids, version),
        degraded=False,
        missing=[],
        lost_mass=torch.zeros(len(x_TD)),
        max_lost_mass=0.0,
        request_id="r",
        dropped=0,
    )


@pytest.mark.slow
def test_the_judge_tells_right_from_wrong(dataset: Dataset, trained: training.Trained) -> None:
    x_TD = dataset.held_x_TD[:8]
    judge = Judge("text", len(trained.experts))
    models = {f"text/e{number}": expert for number, expert in enumerate(trained.experts)}
    judge.register(dict.fromkeys([*models, "text/gate"], "v1"), {**models, "text/gate": trained.gate})
    assert judge(x_TD, reply(trained, x_TD, "v1"))
    assert not judge(x_TD, reply(trained, x_TD, "v1", change=0.01))
    assert not judge(x_TD, reply(trained, x_TD, "v2"))


def test_piped_progress_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "training [dim]expert[/dim] " + "x" * 200

    def fail_after_progress(data: Dataset, *, seed: int, progress: Callable[[str], None]) -> None:
        progress(message)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "standard_library", synthetic)
    monkeypatch.setattr(run, "train", fail_after_progress)
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run.run_demo(console=Console(file=output, width=80, markup=False, highlight=False))
    assert output.getvalue().endswith(f"\n{message}\n")


def test_percentiles() -> None:
    assert percentile([float(value) for value in range(100)], 0.99) == 99.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([], 0.99) == 0.0
