"""Pairs of an image and a text with a label: from a CSV file, or the digits of scikit-learn with sentences by rule."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from expertmesh import ConfigError

from .image_files import FEWEST, as_images, read_image

COLUMNS = ("image", "text", "label")
MOST_FIELD = 1 << 20
STAIN = 4
"""Pixels a side of the stain on each digit."""
MISTAKEN = 0.1
"""The share of the sentences that tell of another digit."""
TELLS = (
    ("an even number", (0, 2, 4, 6, 8)),
    ("an odd number", (1, 3, 5, 7, 9)),
    ("less than five", (0, 1, 2, 3, 4)),
    ("five or more", (5, 6, 7, 8, 9)),
    ("a multiple of three", (0, 3, 6, 9)),
    ("no multiple of three", (1, 2, 4, 5, 7, 8)),
    ("a prime number", (2, 3, 5, 7)),
    ("not a prime number", (0, 1, 4, 6, 8, 9)),
)
OPENINGS = ("the clerk noted", "the form says it is", "somebody wrote", "this should be", "on the phone they said")


@dataclass(frozen=True)
class Pairs:
    """Images [T, C, S, S] and texts with their labels [T]; what a pair does not have is False in `seen`, `told`."""

    images: Tensor
    texts: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]
    seen: Tensor
    told: Tensor


def digits_with_sentences(seed: int = 0) -> Pairs:
    """Handwritten digits, each under a stain, and a sentence that says two things about it, or about another digit.

    The digits are real; the stains and the sentences are drawn with the seed.
    """
    draw = random.Random(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    for image in images:
        row, column = draw.randrange(9 - STAIN), draw.randrange(9 - STAIN)
        image[:, row : row + STAIN, column : column + STAIN] = 1.0
    texts = tuple(_sentence(int(label), draw) for label in digits.target)
    all_of_them = torch.ones(len(texts), dtype=torch.bool)
    names = tuple(str(name) for name in digits.target_names)
    return Pairs(images, texts, torch.tensor(digits.target).long(), names, all_of_them, all_of_them)


def _sentence(digit: int, draw: random.Random) -> str:
    if draw.random() < MISTAKEN:
        digit = draw.randrange(10)
    first, second = draw.sample([text for text, digits in TELLS if digit in digits], 2)
    return f"{draw.choice(OPENINGS)} {first} and {second}"


def read_pairs(path: Path, side: int) -> Pairs:
    """The rows of a CSV file (UTF-8) with the columns image, text and label.

    `image` is the path of a file, from the folder of the CSV file on; an empty field is an image or a text that is
    missing. Raises ConfigError with file and line, also where a row has neither, or a label has too few rows.
    """
    pixels, texts, labels, seen = [], [], [], []
    for line, row in _rows(path):
        where = f"{path}:{line}"
        image, text, label = (row[name].strip() for name in COLUMNS)
        if not label:
            raise ConfigError(f"{where}: the label is empty; give one, or take the row away")
        if not image and not text:
            raise ConfigError(f"{where}: the row has neither image nor text; give one, or take the row away")
        seen.append(bool(image))
        pixels.append(read_image(path.parent / image, side, where) if image else _nothing(side))
        texts.append(text)
        labels.append(label)
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise ConfigError(f"{path}: it has {len(labels)} rows and {len(names)} labels; at least two labels are needed")
    rare = [name for name in names if labels.count(name) < FEWEST]
    if rare:
        raise ConfigError(f"{path}: the label {rare[0][:40]!r} has {labels.count(rare[0])} rows; {FEWEST} are needed")
    if not any(seen) or not any(texts):
        raise ConfigError(f"{path}: no row has {'a text' if any(seen) else 'an image'}: both kinds are needed")
    places = torch.tensor([names.index(label) for label in labels])
    told = torch.tensor([bool(text) for text in texts])
    return Pairs(as_images(torch.stack(pixels)), tuple(texts), places, names, torch.tensor(seen), told)


def _nothing(side: int) -> Tensor:
    return torch.zeros(3, side, side, dtype=torch.uint8)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the text is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror or error}") from None
    before = csv.field_size_limit(MOST_FIELD)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        missing = [name for name in COLUMNS if header.count(name) != 1]
        if missing:
            raise ConfigError(f"{path}:1: there must be one column {missing[0]!r}; the columns are {', '.join(header)}")
        for row in filter(None, lines):
            if len(row) != len(header):
                raise ConfigError(f"{path}:{lines.line_num}: {len(row)} fields, but the header has {len(header)}")
            yield lines.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}:{lines.line_num}: it is not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
