"""A row of two parts, an image and a text, either of which may be missing: NaN stands for what is not there.

Shapes: T rows, C channels, S pixels a side, L words.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertmesh import InvalidRequest

WORDS = 24
"""Words of a text that are read, from its beginning."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Shape:
    """What a row is made of: an image of C channels and S pixels a side, and L words, each one of so many buckets."""

    channels: int
    side: int
    buckets: int = 4096
    embedded: int = 16
    """Numbers that stand for a word inside a model."""

    @property
    def pixels(self) -> int:
        """Numbers of the image."""
        return self.channels * self.side**2

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.pixels + WORDS

    def row(self, image: Tensor | None, text: str | None) -> Tensor:
        """A row from an image [C, S, S] and a text; what is None is missing. Raises InvalidRequest without both."""
        if image is None and text is None:
            raise InvalidRequest("there is neither an image nor a text: give one of them")
        parts = [torch.full((size,), math.nan) for size in (self.pixels, WORDS)]
        if image is not None:
            parts[0] = image.flatten()
        if text is not None:
            words = _WORD.findall(text.casefold())[:WORDS]
            numbers = [1 + zlib.crc32(word.encode()) % (self.buckets - 1) for word in words]  # 0 is no word
            parts[1] = torch.tensor(numbers + [0] * (WORDS - len(numbers)), dtype=torch.float32)
        return torch.cat(parts)

    def words(self) -> nn.EmbeddingBag:
        """A module from the numbers of words to the sum of what stands for them."""
        return nn.EmbeddingBag(self.buckets, self.embedded, mode="sum", padding_idx=0)

    def image_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The images [T, C, S, S] of rows, black where there is none, and which rows have none [T, 1]."""
        part = x[:, : self.pixels]
        return part.nan_to_num().view(-1, self.channels, self.side, self.side), part.isnan().any(dim=1, keepdim=True)

    def words_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the words [T, L] of rows, 0 where there are none, and which rows have no text [T, 1]."""
        part = x[:, self.pixels :]
        return part.nan_to_num().long().clamp(0, self.buckets - 1), part.isnan().any(dim=1, keepdim=True)
