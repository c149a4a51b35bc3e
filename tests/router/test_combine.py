"""Combine against its definition, row by row, with answers that are lost, not finite, dropped or sliced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import InvalidRequest, SpecMismatch, Unavailable
from expertmesh.router.gates import Routing
from expertmesh.router.mixture import ordered_sum as summation
from expertmesh.router.mixture.combine import METHODS, combine
from expertmesh.router.mixture.dispatch import Dispatch, dispatch
from expertmesh.router.mixture.missing import OnMissing, lost_pairs
from expertmesh.router.mixture.ordered_sum import ordered_sum

EXPERTS, WIDTH = 5, 3
MANY = settings(max_examples=60, deadline=None)


def sample(count: int, k: int, seed: int, holes: bool = False) -> tuple[Dispatch, Tensor, Tensor]:
    """A handle, answers [N, D] and rows [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    indices_TK = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :k]
    weights_TK = torch.rand(count, k, generator=generator) + 0.1
    if holes:
        empty_TK = torch.rand(count, k, generator=generator) < 0.4
        indices_TK, weights_TK = indices_TK.masked_fill(empty_TK, -1), weights_TK.masked_fill(empty_TK, 0)
    handle = dispatch(Routing(indices_TK, weights_TK), EXPERTS)
    answers = torch.randn(handle.num_pairs, WIDTH, generator=generator)
    return handle, answers, torch.randn(count, WIDTH, generator=generator)


def naive(
    handle: Dispatch, answers: Tensor, x: Tensor, method: str, policy: str, lost: set[int], fallback: Tensor
) -> Tensor:
    rows = []
    for t, slots in enumerate(handle.slots_TK.tolist()):
        held = [slot for slot in slots if slot >= 0]
        weights = {slot: float(handle.weights_N[slot]) if method != "mean" else 1 / len(held) for slot in held}
        answered = [slot for slot in held if slot not in lost]
        total = torch.zeros(WIDTH)
        for slot in answered:
            total += weights[slot] * answers[slot]
        if len(answered) < len(held):
            if policy == "renormalize":
                total *= sum(weights.values()) / sum(weights[slot] for slot in answered)
            else:
                substitute = x[t] if policy == "residual" else fallback[t]
                total += sum(weights[slot] for slot in held if slot in lost) * substitute
        rows.append(total + (x[t] if method == "residual" else 0))
    return torch.stack(rows) if rows else torch.zeros(0, WIDTH)


@pytest.mark.parametrize("method", ["weighted_sum", "mean", "residual"])
@pytest.mark.parametrize("holes", [False, True])
@MANY
@given(count=st.integers(0, 30), k=st.integers(1, EXPERTS), seed=st.integers(0, 99))
def test_sums_are_the_definition(method: str, holes: bool, count: int, k: int, seed: int) -> None:
    handle, answers, x = sample(count, k, seed, holes)
    combined = combine(handle, answers, method=method, x_T=x)
    torch.testing.assert_close(combined.output, naive(handle, answers, x, method, "error", set(), x))
    assert combined.lost_mass_T.tolist() == [0.0] * count
    assert not combined.degraded


@pytest.mark.parametrize("method", ["weighted_sum", "mean", "residual"])
@pytest.mark.parametrize("policy", ["renormalize", "residual", "fallback:e4"])
@pytest.mark.parametrize("how", ["unanswered", "nan", "infinite"])
@MANY
@given(count=st.integers(1, 20), k=st.integers(2, EXPERTS), seed=st.integers(0, 99))
def test_lost_answers_follow_the_policy(method: str, policy: str, how: str, count: int, k: int, seed: int) -> None:
    handle, answers, x = sample(count, k, seed)
    generator = torch.Generator().manual_seed(seed)
    fallback = torch.randn(count, WIDTH, generator=generator)
    lost = {int(slots[int(torch.randint(k, (1,), generator=generator))]) for slots in handle.slots_TK}
    broken, answered = answers.clone(), None
    if how == "unanswered":
        answered = torch.tensor([slot not in lost for slot in range(handle.num_pairs)])
    broken[list(lost)] = math.nan if how != "infinite" else -math.inf
    arguments: dict[str, Any] = {"method": method, "x_T": x, "answered_N": answered, "max_lost_mass": 1.0}
    combined = combine(handle, broken, on_missing=policy, fallback_T=fallback, **arguments)
    kind = policy.partition(":")[0]
    torch.testing.assert_close(
        combined.output, naive(handle, answers, x, method, kind, lost, fallback), rtol=1e-4, atol=1e-5
    )
    assert combined.degraded
    for slots, mass in zip(handle.slots_TK.tolist(), combined.lost_mass_T.tolist(), strict=True):
        weights = [float(handle.weights_N[slot]) for slot in slots]
        lost_weight = sum(float(handle.weights_N[slot]) for slot in slots if slot in lost)
        assert mass == pytest.approx(lost_weight / sum(weights), abs=1e-6)
    with pytest.raises(Unavailable, match=f"{len(lost)} .*pairs"):
        combine(handle, broken, on_missing="error", **arguments)
    with pytest.raises(Unavailable, match="above max_lost_mass"):
        combine(handle, broken, on_missing=policy, fallback_T=fallback, **arguments | {"max_lost_mass": 0.0})


@MANY
@given(count=st.integers(2, 20), k=st.integers(1, EXPERTS), seed=st.integers(0, 99), data=st.data())
def test_a_slice_is_bit_identical_to_the_whole_and_never_reads_other_rows(
    count: int, k: int, seed: int, data: Any
) -> None:
    handle, answers, x = sample(count, k, seed)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    whole = combine(handle, answers).output
    part = handle.slice(start, stop)
    others = torch.ones(handle.num_pairs, dtype=torch.bool)
    others[part.slots_TK.flatten()] = False
    answers[others] = math.nan
    combined = combine(part, answers, x_T=x[start:stop])
    assert torch.equal(combined.output, whole[start:stop])
    assert torch.equal(combine(part, answers, answered_N=~others).output, whole[start:stop])
    assert not combined.degraded


def test_a_row_without_answers_is_an_error_or_the_substitute() -> None:
    handle, answers, x = sample(3, 2, 0)
    answers[handle.slots_TK[1]] = math.nan
    with pytest.raises(Unavailable, match="nothing is left"):
        combine(handle, answers, on_missing="renormalize", max_lost_mass=1.0)
    with pytest.raises(Unavailable, match=r"above max_lost_mass 0\.5"):
        combine(handle, answers, on_missing="residual", x_T=x)
    with pytest.raises(Unavailable, match=r"pairs of l/e\d, l/e\d were lost"):
        combine(handle, answers, on_missing="residual", x_T=x, names=[f"l/e{number}" for number in range(9)])
    filled = combine(handle, answers, on_missing="fallback:f", fallback_T=x)  # a fallback stands in for all of a row
    assert torch.equal(filled.output, combine(handle, answers, on_missing="residual", x_T=x, max_lost_mass=1.0).output)
    with pytest.raises(Unavailable, match=r"above max_lost_mass 0\.5"):
        combine(handle, answers, on_missing="fallback:f", fallback_T=x, max_lost_mass=0.5)
    replaced = combine(handle, answers, on_missing="residual", x_T=x, max_lost_mass=1.0)
    torch.testing.assert_close(replaced.output[1], handle.weights_N[handle.slots_TK[1]].sum() * x[1])
    assert replaced.lost_mass_T.tolist() == [0.0, 1.0, 0.0]


def test_weights_of_zero_cannot_be_renormalized() -> None:
    handle = dispatch(Routing(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]])), 2)
    with pytest.raises(Unavailable, match="weight zero"):
        combine(handle, torch.tensor([[math.nan], [1.0]]), on_missing="renormalize", max_lost_mass=1.0)
    handle = dispatch(Routing(torch.tensor([[0, 1]]), torch.zeros(1, 2)), 2)
    combined = combine(handle, torch.tensor([[math.nan], [1.0]]), on_missing="residual", x_T=torch.ones(1, 1))
    assert combined.lost_mass_T.tolist() == [0.5]


@pytest.mark.parametrize("policy", ["residual", "fallback:e0"])
def test_a_substitute_that_is_missing_or_not_finite_is_an_error(policy: str) -> None:
    handle, answers, _ = sample(3, 2, 0)
    answers[0] = math.nan
    with pytest.raises(Unavailable, match="are not available"):
        combine(handle, answers, on_missing=policy, max_lost_mass=1.0)
    bad = torch.full((3, WIDTH), math.nan)
    with pytest.raises(Unavailable, match="not finite"):
        combine(handle, answers, on_missing=policy, max_lost_mass=1.0, x_T=bad, fallback_T=bad)


# --- vote --------------------------------------------------------------------------------------------------------


def majority(labels: list[int]) -> int:
    return min(set(labels), key=lambda label: (-labels.count(label), label))


@MANY
@given(count=st.integers(0, 20), k=st.integers(1, EXPERTS), seed=st.integers(0, 99), logits=st.booleans())
def test_vote_is_the_majority(count: int, k: int, seed: int, logits: bool) -> None:
    handle, answers, _ = sample(count, k, seed)
    labels = answers.argmax(dim=1)
    output = combine(handle, answers if logits else labels, method="vote").output
    assert output.dtype == torch.int64
    assert output.tolist() == [majority(labels[slots].tolist()) for slots in handle.slots_TK]


def test_only_experts_that_answered_vote() -> None:
    handle = dispatch(Routing(torch.tensor([[0, 1, 2]]), torch.full((1, 3), 1 / 3)), 3)
    labels = torch.tensor([[7, 1], [7, 2], [3, 2]])
    assert combine(handle, labels, method="vote").output.tolist() == [[7, 2]]
    answered = torch.tensor([False, True, True])
    arguments: dict[str, Any] = {"method": "vote", "answered_N": answered}
    assert combine(handle, labels, on_missing="renormalize", **arguments).output.tolist() == [[3, 2]]
    substitute_rows = torch.tensor([[7, 1]])
    assert combine(
        handle, labels, on_missing="fallback:f", fallback_T=substitute_rows, **arguments
    ).output.tolist() == [[7, 2]]
    with pytest.raises(Unavailable, match=r"1 .*pairs"):
        combine(handle, labels, **arguments)
    with pytest.raises(InvalidRequest, match="no meaning"):
        combine(handle, labels, on_missing="residual", x_T=labels[:1], **arguments)


def test_vote_leaves_out_logits_that_are_not_finite() -> None:
    handle = dispatch(Routing(torch.tensor([[0, 1, 2]]), torch.full((1, 3), 1 / 3)), 3)
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, 1.0]])
    combined = combine(handle, logits, method="vote", on_missing="renormalize")
    assert combined.output.tolist() == [1]
    assert combined.lost_mass_T.tolist() == pytest.approx([1 / 3])


# --- rows without an expert, shared experts, shapes and dtypes ----------------------------------------------------


@pytest.mark.parametrize("method", ["weighted_sum", "mean", "residual"])
def test_rows_without_an_expert_are_flagged_and_follow_the_declared_policy(method: str) -> None:
    routing = Routing(torch.tensor([[0, 1], [-1, -1]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]]), torch.tensor([0, 2]))
    handle = dispatch(routing, 2)
    x, answers = torch.full((2, 1), 5.0), torch.tensor([[1.0], [3.0]])
    zero = combine(handle, answers, method=method, x_T=x)
    passed = combine(handle, answers, method=method, x_T=x, on_dropped="residual")
    assert zero.output[1] == (5.0 if method == "residual" else 0.0)
    assert passed.output[1] == 5.0
    assert zero.degraded
    assert zero.dropped_T is not None
    assert zero.dropped_T.tolist() == [0, 2]
    assert not combine(handle.slice(0, 1), answers, method=method, x_T=x[:1]).degraded
    with pytest.raises(Unavailable, match="no vote"):
        combine(handle, answers.long(), method="vote")


def test_shared_experts_are_added() -> None:
    handle, answers, x = sample(4, 2, 1)
    both = combine(handle, answers, shared_T=x)
    torch.testing.assert_close(both.output, combine(handle, answers).output + x)
    with pytest.raises(Unavailable, match="shared"):
        combine(handle, answers, shared_T=x / 0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_trailing_shape_and_float_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    handle, _, _ = sample(7, 3, 2)
    answers = torch.randn(handle.num_pairs, *shape, dtype=torch.float64).to(dtype)
    output = combine(handle, answers).output
    assert (output.shape, output.dtype) == ((7, *shape), dtype)
    weights = handle.weights_N.double()[handle.slots_TK].view(7, 3, *(1 for _ in shape))
    expected = (weights * answers.double()[handle.slots_TK]).sum(dim=1)
    torch.testing.assert_close(
        output.double(), expected.to(dtype).double(), rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
    )
    assert combine(handle, answers, out_dtype=torch.float32).output.dtype == torch.float32


@pytest.mark.parametrize("holes", [False, True])
@torch.no_grad()
def test_half_precision_answers_are_summed_in_blocks_bit_for_bit(holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, answers, x = sample(40, 3, 5, holes)
    narrow = answers.bfloat16()
    whole = [combine(handle, narrow).output, combine(handle, narrow, shared_T=x).output]
    monkeypatch.setattr(summation, "BLOCK_ROWS", 7)
    assert torch.equal(combine(handle, narrow).output, whole[0])
    assert torch.equal(combine(handle, narrow, shared_T=x).output, whole[1])
    assert torch.equal(combine(handle, narrow, out_dtype=torch.float32).output, combine(handle, narrow.float()).output)


def test_integers_are_summed_as_floats_and_float16_results_may_not_overflow() -> None:
    handle = dispatch(Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)), 2)
    assert combine(handle, torch.tensor([[3], [4]])).output.tolist() == [[7.0]]
    halves = torch.full((2, 1), 60000.0, dtype=torch.float16)
    assert combine(handle, halves, out_dtype=torch.float32).output.tolist() == [[120000.0]]
    with pytest.raises(Unavailable, match=r"overflows torch\.float16"):
        combine(handle, halves)


def test_sums_are_in_expert_order_and_repeat_bit_for_bit() -> None:
    handle, answers, _ = sample(50, 4, 3)
    step = torch.zeros(50, WIDTH)
    for k in range(4):
        slots = handle.slots_TK[:, k]
        step = torch.addcmul(step, answers[slots], handle.weights_N[slots, None])
    once = ordered_sum(handle, answers, handle.weights_N[handle.slots_TK])
    torch.testing.assert_close(once, step, rtol=2e-7, atol=1e-7)
    assert all(torch.equal(combine(handle, answers).output, once) for _ in range(5))
    big = torch.tensor([[1e8], [-1e8], [1.0]])  # in another order the 1 is lost
    ordered = dispatch(Routing(torch.tensor([[2, 0, 1]]), torch.ones(1, 3)), 3)
    assert combine(ordered, big).output.item() == 1.0


def test_gradients_flow_to_answers_and_weights() -> None:
    torch.manual_seed(0)
    indices_TK, weights_TK = torch.tensor([[0, 2], [1, -1], [2, 1]]), torch.rand(3, 2, dtype=torch.float64)
    weights_TK[1, 1] = 0
    answers = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def layer(answers: Tensor, weights_TK: Tensor) -> Tensor:
        return combine(dispatch(Routing(indices_TK, weights_TK), 3), answers).output

    assert torch.autograd.gradcheck(layer, (answers, weights_TK.requires_grad_()))


# --- bad input ---------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_rejected() -> None:
    handle, answers, x = sample(4, 2, 1)
    for arguments in ({"method": "median"}, {"on_dropped": "drop"}, {"on_missing": "ignore"}, {"method": "residual"}):
        with pytest.raises(InvalidRequest):
            combine(handle, answers, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SpecMismatch, match="pairs"):
        combine(handle, answers[1:])
    with pytest.raises(SpecMismatch, match="x_T"):
        combine(handle, answers, method="residual", x_T=x[1:])
    with pytest.raises(SpecMismatch, match="logits"):
        combine(handle, answers[:, 0], method="vote")
    assert METHODS == ("weighted_sum", "mean", "vote", "residual")


@pytest.mark.parametrize("text", ["error", "renormalize", "residual", "fallback:e7", "fallback:a:b"])
def test_policies_are_parsed_and_printed(text: str) -> None:
    assert str(OnMissing.parse(text)) == text


@pytest.mark.parametrize("text", ["", "Error", "fallback", "fallback:", "error:e1", "residual:"])
def test_unknown_policies_are_rejected(text: str) -> None:
    with pytest.raises(InvalidRequest, match="fallback:<expert>"):
        OnMissing.parse(text)


def test_lost_pairs_looks_only_at_its_own_pairs() -> None:
    handle, answers, _ = sample(4, 2, 1)
    assert lost_pairs(handle, answers) is None
    answers[handle.slots_TK[3]] = math.inf
    assert lost_pairs(handle.slice(0, 3), answers) is None
    lost = lost_pairs(handle, answers)
    assert lost is not None
    assert lost.tolist() == [[False, False]] * 3 + [[True, True]]
