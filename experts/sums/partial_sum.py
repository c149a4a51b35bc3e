"""Weighted sums of several experts' answers to the same rows, computed by the replica to send fewer rows.

Shapes: N pairs of the message, R rows of one sum, P pairs of one part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..protocol import ExpertCall, PartFailure, PartialSum
from .bag_sum import bag_sum


def add_up(
    call: ExpertCall, outputs: Sequence[Tensor | PartFailure]
) -> tuple[tuple[Tensor | PartFailure, ...], Tensor | None]:
    """The partial sums of a message, on the CPU, and the pairs [L] int64 that no sum contains.

    Accumulates in float32 (float64 for float64 answers) in the order of the parts, which is that of the experts. Failed
    parts and pairs whose answer is not finite add nothing; only the latter are listed.
    """
    sums: list[Tensor | PartFailure] = []
    lost: list[Tensor] = []
    for partial in call.sums:
        total, missing = _sum(call, partial, outputs)
        sums.append(total)
        lost += missing
    return tuple(sums), torch.cat(lost).cpu() if lost else None


def _sum(
    call: ExpertCall, partial: PartialSum, outputs: Sequence[Tensor | PartFailure]
) -> tuple[Tensor | PartFailure, list[Tensor]]:
    answered = [(at, out) for at in range(partial.first, partial.last) if isinstance(out := outputs[at], Tensor)]
    if not answered:
        failure = outputs[partial.first]
        return failure, []
    if len({tuple(out.shape[1:]) for _, out in answered}) > 1:
        names = ", ".join(call.parts[at].expert for at, _ in answered)
        return PartFailure("SpecMismatch", f"the experts {names} answer with rows of different shapes"), []
    total = _total(call, partial, answered)
    if math.isfinite(total.sum().item()) or bool(total.isfinite().all()):  # NaN and infinity survive every sum
        return total.cpu(), []
    lost, kept = [], []
    for at, out in answered:
        bad_P = ~out.isfinite().flatten(1).all(dim=1)
        lost.append(bad_P.nonzero().flatten() + call.parts[at].start)
        kept.append((at, out.masked_fill(bad_P.view(-1, *[1] * (out.dim() - 1)), 0)))
    return _total(call, partial, kept).cpu(), lost


def _total(call: ExpertCall, partial: PartialSum, answered: Sequence[tuple[int, Tensor]]) -> Tensor:
    parts = [call.parts[at] for at, _ in answered]
    answers_P = answered[0][1] if len(answered) == 1 else torch.cat([out for _, out in answered])
    pairs_P = np.arange(parts[0].start, parts[-1].stop)
    if len(pairs_P) > answers_P.shape[0]:  # a part between them failed
        pairs_P = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    rows_P = (pairs_P if call.row_index is None else call.row_index.numpy()[pairs_P]) - partial.start
    order_P = np.argsort(rows_P, kind="stable")  # by row, and for each row by expert
    starts_R = np.searchsorted(rows_P[order_P], np.arange(partial.stop - partial.start))
    order, starts = torch.from_numpy(order_P), torch.from_numpy(starts_R)
    weights_P = call.weights[torch.from_numpy(pairs_P[order_P])]
    if answers_P.device.type != "cpu":
        order, starts, weights_P = (tensor.to(answers_P.device) for tensor in (order, starts, weights_P))
    return bag_sum(answers_P, order, starts, weights_P)
