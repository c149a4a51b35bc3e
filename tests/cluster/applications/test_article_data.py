"""What of the flow of the article is pure: its decision, its preprocessing, what sub-models share, and sizes."""

from __future__ import annotations

import copy

import pytest
import torch

from expertmesh import ConfigError, gates
from expertmesh.cluster.demo.text import Corpus
from expertmesh.cluster.training.data import TrainingData
from expertmesh.examples.article import Branch, Size, active, equal_widths, preprocessed, share_of, shared_of
from expertmesh.experts.modules import FeedForward
from expertmesh.router.mixture.local import LocalLayer


@pytest.mark.parametrize("text", ["much", "1.5", "-0.1", "nan", ""])
def test_a_share_of_zeros_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sparse_from="):
        share_of(text)
    assert share_of("0.75") == 0.75


def test_rows_have_equal_length_and_no_stop_words() -> None:
    texts = tuple(
        f"The {'ship sails the sea' if n % 2 else 'rose and the seed'}, {'abcdefgh'[n % 8]}{n}!" for n in range(40)
    )
    data = preprocessed(Corpus(texts, tuple(n % 2 for n in range(40)), ("garden", "sea"), "made"), Size(words=5), 0)
    assert data.x.shape == (32, 5)  # ship, sails, sea, rose, seed: neither "the" and "and" nor what is no word
    torch.testing.assert_close(data.x.norm(dim=1), torch.full((32,), 5**0.5))


def test_texts_of_stop_words_alone_are_refused() -> None:
    corpus = Corpus(("the and",) * 20, (0, 1) * 10, ("a", "b"), "made")
    with pytest.raises(ConfigError, match="made: no words are left"):
        preprocessed(corpus, Size(), 0)


def test_what_is_shared_are_the_units_that_differ_least() -> None:
    torch.manual_seed(0)
    first = FeedForward(6, 4, out_features=2)
    experts = [copy.deepcopy(first) for _ in range(3)]
    with torch.no_grad():
        for number, expert in enumerate(experts):
            expert.up_proj.weight[1] += number  # units 1 and 2 differ, 0 and 3 hardly
            expert.down_proj.weight[:, 2] -= number
            expert.up_proj.weight[0] += 0.001 * number
    rows, labels = torch.randn(20, 6), torch.tensor([0, 1] * 10)
    data = TrainingData(rows, labels, rows, labels, ("a", "b"))
    common, rests, told = shared_of(experts, torch.tensor([1, 1, 2]), data, Size(common=2))
    assert common.up_proj.out_features == 2
    torch.testing.assert_close(common.up_proj.weight[1], first.up_proj.weight[3])
    torch.testing.assert_close(common.up_proj.weight[0], first.up_proj.weight[0] + 0.001 * 5 / 4)
    assert [rest.up_proj.out_features for rest in rests] == [2, 2, 2]
    for rest, expert in zip(rests, experts, strict=True):
        torch.testing.assert_close(common(rows) + rest(rows), expert(rows))
    assert "2 units shared" in told[0]


def test_dense_models_have_as_many_parameters() -> None:
    rows, labels = torch.randn(10, 20), torch.tensor([0, 1] * 5)
    data = TrainingData(rows, labels, rows, labels, ("a", "b"))
    experts = {f"e{number}": FeedForward(20, 6, out_features=2) for number in range(4)}
    local = LocalLayer(gates.TopK(20, 4, k=2), experts, shared=FeedForward(20, 3, out_features=2))
    each, shared, gate = 20 * 6 + 6 + 6 * 2 + 2, 20 * 3 + 3 + 3 * 2 + 2, 20 * 4
    assert active(local) == gate + shared + 2 * each
    widths = equal_widths(Branch("some", data, local, 0.0))
    for hidden, wanted in zip(widths.values(), (gate + shared + 2 * each, gate + shared + 4 * each), strict=True):
        assert abs(20 * hidden + hidden + hidden * 2 + 2 - wanted) <= 12  # half a unit
