"""The demo's features: text encoded by scikit-learn and split into training and held-out rows.

Shapes: T rows, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from torch import Tensor

from ...experts.errors import ConfigError
from .text import Corpus

HELD_OUT = 0.2
WIDTH = 512
VOCABULARY = 20_000
TOKEN = r"(?u)[^\W\d_]{2,}"  # letters only: punctuation, digits and underscores separate words


@dataclass(frozen=True)
class Split:
    """The positions of the training texts and of the held-out texts in a corpus: ascending, and disjoint."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Training and held-out rows [T, D] float32 with their labels [T] int64."""

    train_x_TD: Tensor
    train_y_T: Tensor
    held_x_TD: Tensor
    held_y_T: Tensor
    names: tuple[str, ...]
    vocabulary: int

    @property
    def width(self) -> int:
        """D."""
        return int(self.train_x_TD.shape[1])


def split(corpus: Corpus, *, seed: int = 0, rows_limit: int | None = None) -> Split:
    """Hold out a random fifth of the rows of each label; with `rows_limit`, of that many random rows.

    Raises ConfigError if a label would have no rows on one side.
    """
    positions = list(range(len(corpus)))
    labels = np.asarray(corpus.labels)
    try:
        if rows_limit is not None and rows_limit < len(corpus):
            positions, _ = train_test_split(positions, train_size=rows_limit, stratify=labels, random_state=seed)
        parts = train_test_split(positions, test_size=HELD_OUT, stratify=labels[positions], random_state=seed)
    except ValueError as error:
        raise ConfigError(f"{corpus.source}: cannot be split by label: {error}") from error
    train, held_out = (tuple(sorted(part)) for part in parts)
    return Split(train, held_out)


def encode(corpus: Corpus, parts: Split, *, seed: int = 0) -> Dataset:
    """Encode texts as rows of D features, with an encoder that is fitted on the training texts only.

    Drops stop words and punctuation, weights words and word pairs by tf-idf, keeps the D strongest directions (latent
    semantic analysis) and scales each row to length √D. A text without a word of the vocabulary is a row of zeros.
    Raises ConfigError if too few words are left.
    """
    words = _vectorizer()
    try:
        train = words.fit_transform([corpus.texts[position] for position in parts.train])
    except ValueError as error:
        raise ConfigError(f"{corpus.source}: no words are left after cleaning: {error}") from error
    held_out = words.transform([corpus.texts[position] for position in parts.held_out])
    rows, vocabulary = train.shape
    width = min(WIDTH, rows // 2, vocabulary - 1)
    if width < 2:
        raise ConfigError(
            f"{corpus.source}: only {vocabulary} words occur in two training texts; longer texts are needed"
        )
    reduce = make_pipeline(TruncatedSVD(width, random_state=seed), Normalizer()).fit(train)
    return Dataset(
        train_x_TD=_rows(reduce.transform(train)),
        train_y_T=_labels(corpus, parts.train),
        held_x_TD=_rows(reduce.transform(held_out)),
        held_y_T=_labels(corpus, parts.held_out),
        names=corpus.names,
        vocabulary=vocabulary,
    )


def _vectorizer() -> Any:
    return TfidfVectorizer(
        lowercase=True,
        strip_accents="unicode",
        stop_words="english",
        token_pattern=TOKEN,
        ngram_range=(1, 2),
        min_df=2,
        max_features=VOCABULARY,
        sublinear_tf=True,
        dtype=np.float32,
    )


def _rows(values: Any) -> Tensor:
    rows_TD = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    scaled_TD: Tensor = rows_TD * rows_TD.shape[1] ** 0.5
    return scaled_TD


def _labels(corpus: Corpus, positions: Sequence[int]) -> Tensor:
    return torch.tensor([corpus.labels[position] for position in positions])
