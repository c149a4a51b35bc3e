"""A small encoder-decoder transformer (Vaswani et al. 2017, norms first) whose beam search computes no token twice.

Shapes: B sentences, S source tokens, T target tokens, K hypotheses, D width, V vocabulary, N tokens without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, BEGIN, END = 0, 1, 2
DROPOUT = 0.1
BEAMS = 4
Keys = tuple[Tensor, Tensor]
"""Keys and values, each [B, heads, T, D / heads]."""


class Attention(nn.Module):
    """Attention of several heads to keys and values, which may have been computed before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)

    def keys(self, x_BSD: Tensor) -> Keys:
        """Keys and values, each [B, heads, S, D / heads]."""
        keys, values = self.key_value(x_BSD).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def forward(self, x_BTD: Tensor, keys: Keys, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """What the places of x are told."""
        query = self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        told = F.scaled_dot_product_attention(query, *keys, attn_mask=mask, is_causal=causal)
        merged: Tensor = self.merge(told.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """Attention to its own sequence, in a decoder also to the encoder's, then the feed-forward network of each row."""

    feed_forward: nn.Module

    def __init__(self, width: int, heads: int, feed_forward: nn.Module, *, decodes: bool) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.crossed = Attention(width, heads) if decodes else None
        self.crossed_norm = nn.LayerNorm(width) if decodes else None
        self.feed_forward, self.feed_forward_norm = feed_forward, nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        *,
        mask: Tensor | None = None,
        before: Keys | None = None,
        memory: tuple[Keys, Tensor] | None = None,
    ) -> tuple[Tensor, Keys]:
        """x [B, T, D] after this block, and its keys; rows that are not `real` [B, T] stay out of the network.

        `before` are the keys of the tokens before x, and `memory` those of the encoder with their mask.
        """
        normed = self.attention_norm(x)
        keys = self.attention.keys(normed)
        if before is not None:
            keys = (torch.cat([before[0], keys[0]], dim=2), torch.cat([before[1], keys[1]], dim=2))
        x = x + self.dropout(self.attention(normed, keys, mask, causal=mask is None and before is None))
        if self.crossed is not None and self.crossed_norm is not None and memory is not None:
            x = x + self.dropout(self.crossed(self.crossed_norm(x), *memory))
        answers = torch.zeros_like(x)
        answers[real] = self.feed_forward(self.feed_forward_norm(x[real]))
        return x + self.dropout(answers), keys


class Transformer(nn.Module):
    """Logits of target tokens. One embedding serves both languages and is the output layer, too.

    `feed_forward` makes the network of each block, the encoder's first.
    """

    def __init__(
        self, *, vocabulary: int, width: int, heads: int, depth: int, feed_forward: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        halves = [
            nn.ModuleList(Block(width, heads, feed_forward(), decodes=decodes) for _ in range(depth))
            for decodes in (False, True)
        ]
        self.encoder: Sequence[Block] = halves[0]  # type: ignore[assignment]
        self.decoder: Sequence[Block] = halves[1]  # type: ignore[assignment]
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks by the names of their layers."""
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{name}{number}": block for name, half in halves.items() for number, block in enumerate(half)}

    def encode(self, source_BS: Tensor) -> list[tuple[Keys, Tensor]]:
        """What each block of the decoder attends to: keys, and where the source is no padding."""
        real_BS = source_BS != PAD
        mask = real_BS[:, None, None, :]
        x = self._embed(source_BS)
        for block in self.encoder:
            x, _ = block(x, real_BS, mask=mask)
        x = self.encoder_norm(x)
        return [(block.crossed.keys(x), mask) for block in self.decoder if block.crossed is not None]

    def decode(
        self, target_BT: Tensor, real_BT: Tensor, memory: Sequence[tuple[Keys, Tensor]], before: Sequence[Keys] = ()
    ) -> tuple[Tensor, list[Keys]]:
        """The logits [N, V] after each real token of the target, which follows `before`, and the keys of all blocks."""
        x = self._embed(target_BT, before[0][0].shape[2] if before else 0)
        after = []
        for number, block in enumerate(self.decoder):
            x, keys = block(x, real_BT, memory=memory[number], before=before[number] if before else None)
            after.append(keys)
        return F.linear(self.decoder_norm(x[real_BT]), self.embedding.weight), after

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """The logits [N, V] after each token of the target that is no padding."""
        return self.decode(target_BT, target_BT != PAD, self.encode(source_BS))[0]

    def _embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens with the sinusoids of their positions (Vaswani et al. 2017, §3.5)."""
        width = self.embedding.embedding_dim
        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
        angles = torch.arange(first, first + tokens.shape[1])[:, None] * rates
        sinusoids = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
        embedded: Tensor = self.dropout(self.embedding(tokens) * math.sqrt(width) + sinusoids)
        return embedded


@torch.inference_mode()
def beam_search(model: Transformer, source_BS: Tensor, beams: int = BEAMS) -> list[list[int]]:
    """The best hypothesis of each sentence by mean log probability; a sentence ends when its best one does.

    Shapes: B sentences, K hypotheses of each, V vocabulary.
    """
    count, most = len(source_BS), 2 * source_BS.shape[1] + 10
    memory = [
        ((keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0)), mask.repeat_interleave(beams, 0))
        for (keys, values), mask in model.encode(source_BS)
    ]
    tokens = torch.full((count * beams, 1), BEGIN)
    scores_BK = torch.tensor([0.0] + [-math.inf] * (beams - 1)).repeat(count, 1)
    lengths_BK = torch.zeros(count, beams)
    going_BK = torch.ones(count, beams, dtype=torch.bool)
    caches: list[Keys] = []
    while bool(going_BK.any()) and tokens.shape[1] < most:
        going = going_BK.flatten()
        logits, caches = model.decode(tokens[:, -1:], going[:, None], memory, caches)
        log_probabilities = torch.full((count * beams, logits.shape[1]), -math.inf)
        log_probabilities[~going, PAD] = 0.0  # what has ended stays as it is
        log_probabilities[going] = logits.log_softmax(dim=1)
        totals_BKV = scores_BK[:, :, None] + log_probabilities.view(count, beams, -1)
        lengths_BK = lengths_BK + going_BK
        means = (totals_BKV / lengths_BK[:, :, None]).flatten(1)
        chosen_BK = means.topk(beams).indices
        parents_BK, next_BK = chosen_BK // logits.shape[1], chosen_BK % logits.shape[1]
        scores_BK, lengths_BK = totals_BKV.flatten(1).gather(1, chosen_BK), lengths_BK.gather(1, parents_BK)
        going_BK = going_BK.gather(1, parents_BK) & (next_BK != END)
        going_BK = going_BK & going_BK[:, :1]
        rows = (torch.arange(count)[:, None] * beams + parents_BK).flatten()
        tokens = torch.cat([tokens[rows], next_BK.view(-1, 1)], dim=1)
        caches = [(keys[rows], values[rows]) for keys, values in caches]
    best = tokens.view(count, beams, -1)[:, 0].tolist()
    return [[token for token in hypothesis if token > END] for hypothesis in best]
