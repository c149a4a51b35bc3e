"""Ready-made experts against their formulas; packed experts against one expert at a time, in every way of computing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.packed_kinds import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts import grouped
from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import ACTIVATIONS, FeedForward, GatedFeedForward, PackedExperts, SigmoidScaled

EXPERTS, WIDTH, HIDDEN = 4, 8, 16


def packed(kind: str, dtype: torch.dtype = torch.float32) -> PackedExperts:
    torch.manual_seed(0)
    experts = PackedExperts(EXPERTS, WIDTH, HIDDEN, **KINDS[kind])
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype)


def naive(experts: Any, x: Tensor, offsets: list[int]) -> Tensor:
    parts = []
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        name = "gate_up_proj" if experts.gated else "up_proj"
        up, down = (getattr(experts, key)[e] for key in (name, "down_proj"))
        up, down = (up, down) if experts.transposed else (up.T, down.T)
        h = x[start:stop] @ up
        if hasattr(experts, f"{name}_bias"):
            h = h + getattr(experts, f"{name}_bias")[e]
        if experts.gated:
            a, b = (h[:, 0::2], h[:, 1::2]) if experts.interleaved else (h[:, :HIDDEN], h[:, HIDDEN:])
            if experts.limit is None:
                h = experts.activation(a) * b
            else:
                a, b = a.clamp(max=experts.limit), b.clamp(-experts.limit, experts.limit)
                h = (b + 1) * a * torch.sigmoid(experts.alpha * a)
        else:
            h = experts.activation(h)
        y = h @ down
        parts.append(y + experts.down_proj_bias[e] if hasattr(experts, "down_proj_bias") else y)
    return torch.cat(parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=EXPERTS, max_size=EXPERTS), seed=st.integers(0, 9))
def test_packed_experts_are_the_formula(kind: str, grad: bool, counts: list[int], seed: int) -> None:
    experts = packed(kind)
    offsets = [0, *itertools.accumulate(counts)]
    x = torch.randn(offsets[-1], WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.set_grad_enabled(grad):
        found = experts(x, offsets)
    torch.testing.assert_close(found, naive(experts, x, offsets), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["each", "grouped", "chunks"])
@torch.no_grad()
def test_all_ways_of_computing_agree(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = packed(kind)
    offsets = [0, 5, 5, 17, 20]
    x = torch.randn(20, WIDTH)
    monkeypatch.setattr(grouped, "FEW_ROWS", 0 if way == "chunks" else 1000)
    monkeypatch.setattr(grouped, "CHUNK_ROWS", 4)
    monkeypatch.setattr(grouped, "_grouped_wins", lambda *_: way == "grouped")
    torch.testing.assert_close(experts(x, offsets), naive(experts, x, offsets), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_that_grouped_mm_refuses_is_computed_otherwise() -> None:
    experts = packed("swiglu")
    x = torch.randn(20 * WIDTH + 1)[1:].view(20, WIDTH)
    offsets = [0, 5, 5, 17, 20]
    torch.testing.assert_close(experts(x, offsets), naive(experts, x, offsets), rtol=1e-4, atol=1e-5)
    narrow = PackedExperts(EXPERTS, 3, 5)
    assert narrow(torch.randn(8, 3), [0, 2, 4, 6, 8]).shape == (8, 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_gradients_of_packed_experts(kind: str) -> None:
    experts = packed(kind, torch.float64)
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: experts(rows, [0, 2, 2, 5, 6]), (x,))
    experts(x, [0, 2, 2, 5, 6]).sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


def test_single_experts_are_the_formula() -> None:
    x = torch.randn(5, WIDTH)
    plain, gated = FeedForward(WIDTH, HIDDEN, activation="relu"), GatedFeedForward(WIDTH, HIDDEN)
    h = (x @ plain.up_proj.weight.T + plain.up_proj.bias).clamp(min=0)
    torch.testing.assert_close(plain(x), h @ plain.down_proj.weight.T + plain.down_proj.bias)
    a, b = x @ gated.gate_proj.weight.T, x @ gated.up_proj.weight.T
    torch.testing.assert_close(gated(x), (a * torch.sigmoid(a) * b) @ gated.down_proj.weight.T)
    scaled = SigmoidScaled(gated, WIDTH)
    torch.testing.assert_close(scaled(x), torch.sigmoid(x @ scaled.scale.weight.T) * gated(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_found_by_name(name: str) -> None:
    assert FeedForward(WIDTH, HIDDEN, activation=name)(torch.zeros(2, WIDTH)).shape == (2, WIDTH)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation is 'swish'"):
        FeedForward(WIDTH, HIDDEN, activation="swish")
    for rows, offsets in ((torch.zeros(3, WIDTH + 1), [0, 0, 0, 0, 3]), (torch.zeros(3, WIDTH), [0, 3])):
        with pytest.raises(SpecMismatch, match="packed experts"):
            packed("swiglu")(rows, offsets)
