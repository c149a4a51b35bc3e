"""Weighted sums of several experts' answers to the same rows, made where the experts run: fewer rows to send.

Shapes: N pairs of the message, R rows of one sum, P pairs of one part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocol import ExpertCall, PartFailure, PartialSum


def add_up(
    call: ExpertCall, outputs: Sequence[Tensor | PartFailure], index: Tensor | None
) -> tuple[tuple[Tensor | PartFailure, ...], Tensor | None]:
    """Every partial sum that a message asks for, on the CPU, and the pairs [L] int64 that no sum contains.

    Accumulates in float32 (float64 for float64 answers) in the order of the parts, which is that of the experts. A part
    that failed adds nothing and is not listed, a pair whose answer is not finite adds nothing and is.
    """
    sums: list[Tensor | PartFailure] = []
    lost: list[Tensor] = []
    for asked in call.sums:
        total, missing = _sum(call, asked, outputs, index)
        sums.append(total)
        lost += missing
    return tuple(sums), torch.cat(lost).cpu() if lost else None


def _sum(
    call: ExpertCall, asked: PartialSum, outputs: Sequence[Tensor | PartFailure], index: Tensor | None
) -> tuple[Tensor | PartFailure, list[Tensor]]:
    answered = [(at, out) for at in range(asked.first, asked.last) if isinstance(out := outputs[at], Tensor)]
    if not answered:
        failure = outputs[asked.first]
        return failure, []
    if len({tuple(out.shape[1:]) for _, out in answered}) > 1:
        names = ", ".join(call.parts[at].expert for at, _ in answered)
        return PartFailure("SpecMismatch", f"the experts {names} answer with rows of different shapes"), []
    total = _total(call, asked, answered, index)
    if bool(total.sum().isfinite()) or bool(total.isfinite().all()):  # NaN and infinity survive every sum
        return total.cpu(), []
    lost, kept = [], []
    for at, out in answered:
        bad_P = ~out.isfinite().flatten(1).all(dim=1)
        lost.append(bad_P.nonzero().flatten() + call.parts[at].start)
        kept.append((at, out.masked_fill(bad_P.view(-1, *[1] * (out.dim() - 1)), 0)))
    return _total(call, asked, kept, index).cpu(), lost


def _total(call: ExpertCall, asked: PartialSum, answered: Sequence[tuple[int, Tensor]], index: Tensor | None) -> Tensor:
    first = answered[0][1]
    wide = torch.float64 if any(out.dtype == torch.float64 for _, out in answered) else torch.float32
    rows = call.rows.shape[0]
    total_R = torch.zeros((asked.stop - asked.start, *first.shape[1:]), dtype=wide, device=first.device)
    for at, out_P in answered:
        pairs = slice(call.parts[at].start, call.parts[at].stop)
        weights_P = call.weights[pairs].to(first.device, wide).view(-1, *[1] * (out_P.dim() - 1))
        rows_P = torch.arange(rows, device=first.device)[pairs] if index is None else index[pairs]
        total_R.index_add_(0, rows_P - asked.start, out_P.to(wide) * weights_P)
    return total_R
