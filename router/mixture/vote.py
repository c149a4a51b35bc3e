"""Majority vote of experts over classes.

Shapes: T rows, K choices per row, N pairs, C classes; labels may have any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import SpecMismatch


def labels_of(answers: Tensor) -> Tensor:
    """Class labels (int64): integers are labels already, floats [..., C] are logits; ties go to the lower class.

    Raises SpecMismatch for logits without a class dimension.
    """
    if not answers.is_floating_point():
        return answers.long()
    if answers.dim() < 2:
        raise SpecMismatch(
            "'vote' over float answers needs logits [rows, ..., classes], but the answers have one number per row"
        )
    return answers.argmax(dim=-1)


def majority(labels_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """The label [T, ...] with the most votes at each row and position; ties go to the lowest label.

    `labels_TK` is int64 [T, K, ...]. Only votes where `valid_TK` [T, K] is True count; every row needs at least one.
    """
    valid_TK = valid_TK.reshape(valid_TK.shape + (1,) * (labels_TK.dim() - 2)).expand(labels_TK.shape)
    votes_TK = torch.zeros_like(labels_TK)
    for k in range(labels_TK.shape[1]):
        votes_TK += (labels_TK == labels_TK[:, k : k + 1]) & valid_TK[:, k : k + 1]
    votes_TK = votes_TK.masked_fill(~valid_TK, 0)
    most_T = votes_TK.amax(dim=1, keepdim=True)
    highest = torch.iinfo(labels_TK.dtype).max
    return labels_TK.masked_fill(votes_TK < most_T, highest).amin(dim=1)
