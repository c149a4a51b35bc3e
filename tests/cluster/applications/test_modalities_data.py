"""The modalities application without its cluster: rows of two parts, what is missing, and CSV files, good and bad."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from expertmesh import ConfigError, InvalidRequest, gates
from expertmesh.cluster.applications.result import Job
from expertmesh.examples.data.captioned_images import TELLS, digits_with_sentences, read_pairs
from expertmesh.examples.data.two_parts import Shape
from expertmesh.examples.modalities import ImageExpert, Joined, JointScores, TextExpert, read
from expertmesh.router.mixture.local import LocalLayer

SHAPE = Shape(1, 8, 64, 4)
SIZES = (1, 8, 64, 4)
IMAGE = torch.rand(1, 8, 8)


def rows() -> torch.Tensor:
    """Both parts, the image alone, the text alone."""
    return torch.stack([SHAPE.row(IMAGE, "an odd number"), SHAPE.row(IMAGE, None), SHAPE.row(None, "an odd number")])


def layer(scorer: JointScores) -> LocalLayer:
    experts = {f"image{n}": ImageExpert(SIZES, 3, 2) for n in range(2)}
    more = {f"text{n}": TextExpert(SIZES, 3) for n in range(2)}
    return LocalLayer(gates.Custom(scorer, 4, 2), {**experts, **more}, on_missing="renormalize", max_lost_mass=1.0)


def test_a_part_that_is_missing_is_nan_and_its_expert_has_no_answer() -> None:
    x = rows()
    assert x.shape == (3, SHAPE.width)
    assert ImageExpert(SIZES, 3, 2)(x).isnan().any(dim=1).tolist() == [False, False, True]
    assert TextExpert(SIZES, 3)(x).isnan().any(dim=1).tolist() == [False, True, False]
    assert bool(Joined(SIZES, 3, 2)(x).isfinite().all())
    with pytest.raises(InvalidRequest, match="neither an image nor a text"):
        SHAPE.row(None, None)


def test_an_empty_text_is_a_text_and_words_are_told_apart_by_what_they_are() -> None:
    assert bool(TextExpert(SIZES, 3)(SHAPE.row(None, "")[None]).isfinite().all())
    first, second = SHAPE.row(None, "Seven, or more!"), SHAPE.row(None, "seven or more")
    assert torch.equal(first[SHAPE.pixels :], second[SHAPE.pixels :])
    assert not torch.equal(first[SHAPE.pixels :], SHAPE.row(None, "eight or more")[SHAPE.pixels :])


def test_the_gate_asks_one_expert_of_each_kind_for_every_row() -> None:
    x = torch.stack([SHAPE.row(torch.rand(1, 8, 8), f"word{n}") for n in range(50)])
    scorer = JointScores(SIZES, 4)
    routing = gates.Custom(scorer, 4, 2)(x)
    assert (routing.indices_TK < 2).sum(dim=1).tolist() == [1] * 50
    chosen = scorer.raw(x).gather(1, routing.indices_TK)
    assert torch.allclose(routing.weights_TK, chosen.softmax(dim=1), atol=1e-3)


def test_what_is_missing_is_left_out_flagged_and_teaches_nothing_that_is_not_finite() -> None:
    scorer = JointScores(SIZES, 4)
    whole = layer(scorer)
    answer = whole.answer(rows())
    assert answer.degraded
    assert (answer.lost_mass_T > 0).tolist() == [False, True, True]
    alone = [whole.experts[f"text{n}"](rows()[2:]) for n in range(2)]
    assert any(torch.allclose(answer.output[2:], own) for own in alone)
    answer.output.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in whole.parameters() if p.grad is not None)


def test_sentences_are_true_of_the_digit_but_for_mistakes() -> None:
    pairs = digits_with_sentences()
    wrong = 0
    for text, label in zip(pairs.texts, pairs.labels.tolist(), strict=True):
        told = [
            digits
            for tell, digits in TELLS
            if f" {tell}" in f" {text}" and (tell[0] != "a" or f"not {tell}" not in text)
        ]
        wrong += not all(label in digits for digits in told)
    assert 0.02 < wrong / len(pairs.texts) < 0.12
    assert pairs.texts == digits_with_sentences().texts


def table(path: Path, lines: list[str], header: str = "image,text,label") -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (20, 30), "red" if name == "a" else "blue").save(path.parent / f"{name}.png")
    path.write_text("\n".join([header, *lines, ""]))
    return path


GOOD = ["a.png,some words,x"] * 6 + ["b.png,,y"] * 3 + [",other words,y"] * 3


def test_a_table_is_read_with_what_it_lacks(tmp_path: Path) -> None:
    pairs = read_pairs(table(tmp_path / "t.csv", GOOD), 16)
    assert pairs.names == ("x", "y")
    assert pairs.images.shape == (12, 3, 16, 16)
    assert pairs.seen.tolist() == [True] * 9 + [False] * 3
    assert pairs.told.tolist() == [True] * 6 + [False] * 3 + [True] * 3
    data = read(Job(seed=0, folder=tmp_path, data=tmp_path / "t.csv", options={"side": "16"}))
    assert not bool(data.x.isnan().all(dim=1).any())


@pytest.mark.parametrize(
    ("lines", "header", "named"),
    [
        ([], "", r"t\.csv:1: there must be one column 'image'"),
        ([], "image,text,label", r"t\.csv: it has 0 rows"),
        (GOOD, "image,words,label", r"t\.csv:1: there must be one column 'text'"),
        ([*GOOD, "a.png,words"], "image,text,label", r"t\.csv:14: 2 fields, but the header has 3"),
        ([*GOOD, "a.png,words,"], "image,text,label", r"t\.csv:14: the label is empty"),
        ([*GOOD, ",,x"], "image,text,label", r"t\.csv:14: the row has neither"),
        ([*GOOD, "c.png,words,x"], "image,text,label", r"t\.csv:14: image '.*c\.png' does not exist"),
        ([*GOOD, "t.csv,words,x"], "image,text,label", r"t\.csv:14: image '.*t\.csv' cannot be read"),
        (["a.png,some words,x"] * 6, "image,text,label", r"at least two labels"),
        ([*GOOD, "a.png,words,z"], "image,text,label", r"the label 'z' has 1 rows"),
        ([*GOOD, f'a.png,"{"x" * (1 << 21)}",x'], "image,text,label", r"t\.csv:14: it is not CSV"),
        (["a.png,,x"] * 6 + ["b.png,,y"] * 6, "image,text,label", r"no row has a text"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, lines: list[str], header: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read_pairs(table(tmp_path / "t.csv", lines, header), 16)
    assert "\n" not in str(caught.value)


def test_another_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"image,text,label\n,caf\xe9,x\n")
    with pytest.raises(ConfigError, match=r"t\.csv:2: the text is not UTF-8"):
        read_pairs(tmp_path / "t.csv", 16)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pairs(tmp_path / "none.csv", 16)


def test_nan_is_what_stands_for_missing() -> None:
    assert math.isnan(float(SHAPE.row(None, "words")[0]))
