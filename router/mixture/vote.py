"""Majority vote of experts over classes.

Shapes: T rows, K choices a row, N pairs, C classes; labels may have any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import SpecMismatch


def labels_of(answers: Tensor) -> Tensor:
    """Class labels (int64): integers are labels themselves, floats [..., C] are logits, the lower of equals wins.

    Raises SpecMismatch for logits without a class dimension.
    """
    if not answers.is_floating_point():
        return answers.long()
    if answers.dim() < 2:
        raise SpecMismatch(
            "vote over float answers needs logits [rows, ..., classes], but the answers have one number a row"
        )
    return answers.argmax(dim=-1)


def majority(labels_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """The label [T, ...] with most votes in each row and position; of equal counts the lowest label.

    `labels_TK` int64 [T, K, ...]; only votes where `valid_TK` [T, K] count; every row needs one.
    """
    valid_TK = valid_TK.reshape(valid_TK.shape + (1,) * (labels_TK.dim() - 2)).expand(labels_TK.shape)
    votes_TK = torch.zeros_like(labels_TK)
    for k in range(labels_TK.shape[1]):
        votes_TK += (labels_TK == labels_TK[:, k : k + 1]) & valid_TK[:, k : k + 1]
    votes_TK = votes_TK.masked_fill(~valid_TK, 0)
    most_T = votes_TK.amax(dim=1, keepdim=True)
    highest = torch.iinfo(labels_TK.dtype).max
    return labels_TK.masked_fill(votes_TK < most_T, highest).amin(dim=1)
