"""A gate without parameters: it hashes rows to experts, the same way in every process and on every device.

Shapes: T rows, D features, E experts, K choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Gate
from .routing import Routing
from .selection import masked, top

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed integer: the step of splitmix64


class Hash(Gate):
    """Picks k experts for each row by hash, each with weight 1 / k (hash layers, Roller et al. 2021).

    Integer rows (token ids) are hashed as numbers, float rows by their float32 bits. The experts with the k largest
    hashes of (seed, row, expert) are taken (rendezvous hashing), so denying an expert moves only the rows that it had.
    A row with fewer than k allowed experts spreads its weight of 1 over those.

    >>> gate = gates.Hash(num_experts=4, k=2)
    >>> gate(torch.tensor([7, 8, 7])).indices_TK.tolist()  # token ids; equal rows go to the same experts
    [[0, 2], [0, 3], [0, 2]]
    """

    name = "hash"

    def __init__(self, num_experts: int, k: int = 1, *, seed: int = 0) -> None:
        super().__init__(num_experts, k=k)
        self.seed = seed

    def scores(self, x: Tensor) -> Tensor:
        """Pseudo-random numbers in [0, 1), float32 [T, E], a function of seed, row and expert alone."""
        if x.is_floating_point():
            x = (x.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
        numbers_TD = self._features(x, torch.int64)
        steps_D = torch.arange(1, numbers_TD.shape[1] + 1, device=x.device) * _GOLDEN + self.seed
        rows_T = _mix(_mix(numbers_TD + steps_D) + steps_D).sum(dim=1)
        experts_E = _mix(torch.arange(1, self.num_experts + 1, device=x.device) * _GOLDEN)
        hashes_TE = _mix(rows_T[:, None] ^ experts_E)
        return (hashes_TE >> 40 & 0xFFFFFF).float() / 2**24

    def _select(self, scores_TE: Tensor, mask_TE: Tensor | None, k: int) -> Routing:
        _, indices_TK = top(masked(scores_TE, mask_TE), k)
        taken_TK = (indices_TK >= 0).to(scores_TE.dtype)
        return Routing(indices_TK, taken_TK / taken_TK.sum(dim=1, keepdim=True))


def _mix(numbers: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al. 2014) on wrapping int64; masks make the shifts logical."""
    numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return numbers ^ (numbers >> 31 & 0x1FFFFFFFF)
