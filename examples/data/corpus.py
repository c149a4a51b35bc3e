"""Pairs of texts as batches of tokens: what is trained on, what arrives later, what is held out."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from expertmesh.examples.data.pairs import Pair
from expertmesh.examples.models.encoder_decoder import BEGIN, END, PAD

SPECIAL = ("<pad>", "<begin>", "<end>")
SMOOTHING = 0.1


class Subwords:
    """A byte-pair encoding of both languages together, learned from the training pairs: any text has tokens."""

    def __init__(self, pairs: Sequence[Pair], vocabulary: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns of processes that are started later
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        self._tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Tokens of each text, with the ends that the model sees."""
        found = self._tokenizer.encode_batch(list(texts))
        return [torch.tensor([BEGIN, *encoding.ids, END]) for encoding in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(tokens)))


@dataclass(frozen=True)
class Batches:
    """Batches of pairs of similar length, in an order drawn with a seed: a batch for each number of a step."""

    sources: Sequence[Tensor]
    targets: Sequence[Tensor]
    tokens: int
    seed: int

    def first(self, count: int) -> list[list[int]]:
        """The positions of the pairs of so many batches, epoch after epoch."""
        batches: list[list[int]] = []
        draw = random.Random(self.seed)
        while len(batches) < count:
            longest = {n: max(len(self.sources[n]), len(self.targets[n])) for n in range(len(self.sources))}
            order = sorted(longest, key=lambda n: (longest[n], draw.random()))
            epoch: list[list[int]] = [[]]
            for number in order:
                if (len(epoch[-1]) + 1) * longest[number] > self.tokens and epoch[-1]:
                    epoch.append([])
                epoch[-1].append(number)
            draw.shuffle(epoch)
            batches += epoch
        return batches[:count]

    def loss(self, model: nn.Module, batch: Sequence[int]) -> Tensor:
        """The mean loss of a token, with smoothed labels."""
        source_BS, target_BT = (padded([own[n] for n in batch]) for own in (self.sources, self.targets))
        labels_BT = target_BT[:, 1:]
        logits_NV = model(source_BS, target_BT[:, :-1].where(labels_BT != PAD, PAD))
        return F.cross_entropy(logits_NV, labels_BT[labels_BT != PAD], label_smoothing=SMOOTHING)


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of tokens [B, T], with padding behind the shorter ones."""
    return pad_sequence(list(rows), batch_first=True, padding_value=PAD)


@dataclass(frozen=True)
class Corpus:
    """Pairs to train on, those that arrive later, and those held out, and how their texts become tokens."""

    train: Sequence[Pair]
    late: Sequence[Pair]
    held: Sequence[Pair]
    subwords: Subwords

    @classmethod
    def of(cls, pairs: Sequence[Pair], *, held: int, vocabulary: int, seed: int) -> Corpus:
        """Divide the pairs at random; the encoding is learned from those to train on alone."""
        order = list(pairs)
        random.Random(seed).shuffle(order)
        late = max(1, len(order) // 20)
        train = order[held + late :]
        return cls(train, order[held : held + late], order[:held], Subwords(train, vocabulary))

    def batches(self, pairs: Sequence[Pair], tokens: int, seed: int) -> Batches:
        """Batches of pairs of this corpus."""
        sources, targets = (self.subwords.encode(texts) for texts in zip(*pairs, strict=True))
        return Batches(sources, targets, tokens, seed)
