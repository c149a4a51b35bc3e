"""Every gate against its formula written out row by row, and the properties that all gates share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import ConfigError, InvalidRequest, SpecMismatch
from expertmesh.router import gates
from expertmesh.router.gates import Gate, Routing, join

WIDTH, EXPERTS = 6, 8
MANY = settings(max_examples=40, deadline=None)

SAMPLES: dict[str, dict[str, Any]] = {
    "top_k": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3},
    "top_k before": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "softmax": "before", "renormalize": False},
    "top_k grouped": {
        "in_features": WIDTH, "num_experts": EXPERTS, "k": 2, "softmax": "before", "renormalize": False, "groups": 4,
        "top_groups": 2, "scale": 16.0, "bias": True,
    },
    "switch": {"in_features": WIDTH, "num_experts": EXPERTS},
    "noisy_top_k": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3},
    "sigmoid": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "scale": 2.5},
    "sigmoid grouped": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 3, "groups": 4, "top_groups": 2},
    "threshold": {"in_features": WIDTH, "num_experts": EXPERTS, "threshold": 0.6},
    "threshold softmax": {
        "in_features": WIDTH, "num_experts": EXPERTS, "threshold": 0.2, "score": "softmax", "renormalize": False,
    },
    "top_p": {"in_features": WIDTH, "num_experts": EXPERTS, "p": 0.6},
    "cosine": {"in_features": WIDTH, "num_experts": EXPERTS, "k": 2, "projection": 4},
    "expert_choice": {"in_features": WIDTH, "num_experts": EXPERTS, "capacity_factor": 2.0},
    "hash": {"num_experts": EXPERTS, "k": 3, "seed": 5},
    "fixed": {"weights": [0.5, 0.1, 0.0, 2.0, 0.3, 0.3, 0.7, 1.0], "k": 4},
    "custom": {"scorer": "torch.nn:Linear", "args": [WIDTH, EXPERTS], "num_experts": EXPERTS, "k": 2},
}  # fmt: skip
SUMS_TO_ONE = ("top_k", "noisy_top_k", "threshold", "cosine", "hash", "custom", "sigmoid grouped")
SUMS_TO = dict.fromkeys(SUMS_TO_ONE, 1.0) | {"sigmoid": 2.5}
SUMS_TO_AT_MOST = {"top_k before": 1.0, "top_k grouped": 16.0, "switch": 1.0, "threshold softmax": 1.0, "top_p": 1.0}
LEARNED = [name for name in SAMPLES if name not in ("hash", "fixed")]


def make(sample: str, seed: int = 0) -> Gate:
    torch.manual_seed(seed)
    gate = gates.build(sample.partition(" ")[0], **SAMPLES[sample])
    for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]:
        if name != "weights_E":
            torch.nn.init.normal_(tensor, std=0.5 if name == "expert_bias" else 1.0)
    return gate.eval()


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def chosen(routing: Routing) -> list[dict[int, float]]:
    """Per row {expert: weight}."""
    pairs = zip(routing.indices_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    return [{e: w for e, w in zip(es, ws, strict=True) if e >= 0} for es, ws in pairs]


def close(found: list[dict[int, float]], wanted: list[dict[int, float]]) -> None:
    assert [set(row) for row in found] == [set(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


# --- formulas, row by row, in plain Python -----------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def naive_top_k(h: list[float], gate: Any) -> dict[int, float]:
    picked = best(h, gate.k)
    return dict(zip(picked, softmax([h[e] for e in picked]), strict=True))


def naive_top_k_before(h: list[float], gate: Any) -> dict[int, float]:
    return {e: softmax(h)[e] for e in best(h, gate.k)}


def in_best_groups(choice: list[float], gate: Any, count: int) -> list[float]:
    size = len(choice) // gate.groups
    sums = [sum(sorted(choice[g * size : (g + 1) * size])[-count:]) for g in range(gate.groups)]
    kept = best(sums, gate.top_groups)
    return [value if e // size in kept else -math.inf for e, value in enumerate(choice)]


def naive_top_k_grouped(h: list[float], gate: Any) -> dict[int, float]:
    return {e: 16.0 * softmax(h)[e] for e in best(in_best_groups(h, gate, 1), gate.k)}


def naive_switch(h: list[float], gate: Any) -> dict[int, float]:
    return {best(h, 1)[0]: max(softmax(h))}


def naive_sigmoid(h: list[float], gate: Any) -> dict[int, float]:
    s = [sigmoid(value) for value in h]
    choice = in_best_groups([a + b for a, b in zip(s, gate.expert_bias.tolist(), strict=True)], gate, 2)
    picked = best(choice, gate.k)
    return {e: gate.scale * s[e] / sum(s[i] for i in picked) for e in picked}


def naive_threshold(h: list[float], gate: Any) -> dict[int, float]:
    p = [sigmoid(value) for value in h] if gate.score == "sigmoid" else softmax(h)
    picked = [e for e in range(len(h)) if p[e] >= gate.threshold] or best(h, 1)
    total = sum(p[e] for e in picked) if gate.renormalize else 1.0
    return {e: p[e] / total for e in picked}


def naive_top_p(h: list[float], gate: Any) -> dict[int, float]:
    p, picked = softmax(h), []
    for e in best(h, len(h)):
        if sum(p[i] for i in picked) >= gate.p:
            break
        picked.append(e)
    return {e: p[e] for e in picked}


def naive_hash(h: list[float], gate: Any) -> dict[int, float]:
    return dict.fromkeys(best(h, gate.k), 1 / gate.k)


def naive_fixed(h: list[float], gate: Any) -> dict[int, float]:
    return {e: h[e] for e in best([abs(w) for w in h], gate.k)}


NAIVE: dict[str, Callable[[list[float], Any], dict[int, float]]] = {
    "top_k": naive_top_k,
    "top_k before": naive_top_k_before,
    "top_k grouped": naive_top_k_grouped,
    "switch": naive_switch,
    "noisy_top_k": naive_top_k,
    "sigmoid": naive_sigmoid,
    "sigmoid grouped": naive_sigmoid,
    "threshold": naive_threshold,
    "threshold softmax": naive_threshold,
    "top_p": naive_top_p,
    "cosine": naive_top_k,
    "hash": naive_hash,
    "fixed": naive_fixed,
    "custom": naive_top_k,
}


@pytest.mark.parametrize("sample", NAIVE)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_selection_is_the_formula(sample: str, count: int) -> None:
    gate = make(sample)
    scores_TE = gate.scores(rows(count))
    routing = gate.select(scores_TE)
    close(chosen(routing), [NAIVE[sample](h, gate) for h in scores_TE.tolist()])


def test_linear_scores_are_the_formula() -> None:
    gate = make("top_k grouped")
    x = rows(5)
    wanted = [
        [
            sum(a * b for a, b in zip(row, w, strict=True)) + bias
            for w, bias in zip(gate.weight.tolist(), gate.bias.tolist(), strict=True)
        ]
        for row in x.tolist()
    ]
    torch.testing.assert_close(gate.scores(x), torch.tensor(wanted))


def test_cosine_scores_are_the_formula() -> None:
    gate: Any = make("cosine")
    x = rows(5)
    projected = x @ gate.projection_weight.T + gate.projection_bias
    scale = min(math.exp(gate.log_scale.item()), 100.0)
    wanted = [[(scale * torch.cosine_similarity(p, e, dim=0)).item() for e in gate.expert_embedding] for p in projected]
    torch.testing.assert_close(gate.scores(x), torch.tensor(wanted))


def test_noise_is_that_of_the_paper_and_only_in_training() -> None:
    gate: Any = make("noisy_top_k")
    x = rows(4)
    assert torch.equal(gate.scores(x), gate.clean_scores(x))
    gate.train()
    drawn = torch.stack([gate.scores(x) for _ in range(4000)]).detach()
    wanted = torch.nn.functional.softplus(x @ gate.noise_weight.T)
    torch.testing.assert_close(drawn.mean(dim=0), gate.clean_scores(x).detach(), atol=0.25, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0) / wanted.detach(), torch.ones_like(wanted), atol=0.06, rtol=0)


@pytest.mark.parametrize("count", [1, 5, 64])
def test_expert_choice_is_the_formula(count: int) -> None:
    gate: Any = make("expert_choice")
    h = gate.scores(rows(count)).tolist()
    p = [softmax(row) for row in h]
    capacity = min(count, math.ceil(count * gate.capacity_factor / EXPERTS))
    wanted: list[dict[int, float]] = [{} for _ in range(count)]
    for e in range(EXPERTS):
        for t in best([p[t][e] for t in range(count)], capacity):
            wanted[t][e] = p[t][e]
    routing = gate.select(torch.tensor(h))
    close(chosen(routing), wanted)
    assert routing.dropped_T is not None
    assert routing.dropped_T.tolist() == [int(not row) for row in wanted]


# --- properties of all gates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
@MANY
@given(
    count=st.integers(0, 40), seed=st.integers(0, 5), denied=st.sets(st.integers(0, EXPERTS - 1), max_size=EXPERTS - 1)
)
def test_weights_are_finite_experts_distinct_and_masks_hold(
    sample: str, count: int, seed: int, denied: set[int]
) -> None:
    gate = make(sample, seed)
    mask_E = torch.tensor([e not in denied for e in range(EXPERTS)])
    routing = gate(rows(count, seed), mask_TE=mask_E)
    assert routing.weights_TK.isfinite().all()
    assert (routing.weights_TK >= 0).all()
    assert routing.weights_TK.dtype == torch.float32
    assert (routing.weights_TK[routing.indices_TK < 0] == 0).all()
    for row, experts in zip(chosen(routing), routing.indices_TK.tolist(), strict=True):
        assert len(row) == sum(e >= 0 for e in experts)
        assert not set(row) & denied
        assert row or sample == "expert_choice"
        if sample in SUMS_TO:
            assert sum(row.values()) == pytest.approx(SUMS_TO[sample], rel=1e-5)
        if sample in SUMS_TO_AT_MOST:
            assert sum(row.values()) <= SUMS_TO_AT_MOST[sample] * (1 + 1e-5)


@pytest.mark.parametrize("sample", [name for name in SAMPLES if "grouped" not in name and name != "expert_choice"])
@MANY
@given(seed=st.integers(0, 50), allowed=st.sets(st.integers(0, EXPERTS - 1), min_size=4))
def test_denied_experts_might_as_well_not_exist(sample: str, seed: int, allowed: set[int]) -> None:
    gate = make(sample, seed)
    scores_TE = gate.scores(rows(9, seed))
    keep = sorted(allowed)
    smaller = make(sample, seed)
    smaller.num_experts = len(keep)
    if sample == "sigmoid":
        smaller.expert_bias = smaller.expert_bias[keep]
    alone = smaller.select(scores_TE[:, keep])
    masked = gate.select(scores_TE, mask_TE=torch.tensor([e in allowed for e in range(EXPERTS)]))
    close(chosen(masked), [{keep[e]: w for e, w in row.items()} for row in chosen(alone)])


@pytest.mark.parametrize("sample", SAMPLES)
@MANY
@given(count=st.integers(1, 40), seed=st.integers(0, 100))
def test_permuting_rows_permutes_the_routing(sample: str, count: int, seed: int) -> None:
    gate = make(sample)
    scores_TE = gate.scores(rows(count, seed))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    one, other = gate.select(scores_TE), gate.select(scores_TE[order])
    assert torch.equal(one.indices_TK[order], other.indices_TK)
    assert torch.equal(one.weights_TK[order], other.weights_TK)


@pytest.mark.parametrize("sample", [name for name in SAMPLES if gates.GATES[name.partition(" ")[0]].per_row])
@MANY
@given(count=st.integers(1, 600), seed=st.integers(0, 100), ties=st.booleans())
def test_a_rows_choice_does_not_depend_on_the_batch(sample: str, count: int, seed: int, ties: bool) -> None:
    gate = make(sample)
    scores_TE = gate.scores(rows(count, seed))
    if ties:
        scores_TE = scores_TE.round()
    together = gate.select(scores_TE)
    row = seed % count
    alone = gate.select(scores_TE[row : row + 1])
    width = alone.indices_TK.shape[1]
    assert torch.equal(together.indices_TK[row, :width], alone.indices_TK[0])
    assert (together.indices_TK[row, width:] == -1).all()
    torch.testing.assert_close(together.weights_TK[row, :width], alone.weights_TK[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sample", [name for name in SAMPLES if name not in ("expert_choice", "fixed", "sigmoid")])
@pytest.mark.parametrize("count", [1, 500])
def test_equal_scores_go_to_the_lower_index(sample: str, count: int) -> None:
    gate = make(sample)
    if hasattr(gate, "expert_bias"):
        gate.expert_bias.zero_()
    routing = gate.select(torch.full((count, EXPERTS), 0.75))
    width = routing.indices_TK.shape[1]
    assert routing.indices_TK.tolist() == [list(range(width))] * count


@pytest.mark.parametrize("sample", LEARNED)
def test_gradients_flow_to_the_scores(sample: str) -> None:
    gate = make(sample).double()
    scores_TE = gate.scores(rows(4).double()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: gate.select(scores).weights_TK, (scores_TE,))


@pytest.mark.parametrize("sample", [name for name in LEARNED if name != "custom"])
def test_gradients_flow_to_rows_and_parameters(sample: str) -> None:
    gate = make(sample).double()
    x = rows(3).double().requires_grad_()
    parameters = [p for name, p in gate.named_parameters() if name != "noise_weight"]
    assert torch.autograd.gradcheck(lambda *inputs: gate.scores(inputs[0]), (x, *parameters))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_and_any_trailing_shape(sample: str, dtype: torch.dtype) -> None:
    gate = make(sample)
    x = rows(6).to(dtype)
    flat, shaped = gate(x), gate(x.view(6, 2, 3)) if sample != "custom" else gate(x)
    assert torch.equal(flat.indices_TK, shaped.indices_TK)
    assert flat.weights_TK.dtype == torch.float32


@pytest.mark.parametrize("sample", SAMPLES)
def test_save_and_load_give_the_same_gate(sample: str, tmp_path: Any) -> None:
    gate = make(sample)
    gate.save(tmp_path / "gate.safetensors")
    for loaded in (Gate.load(tmp_path / "gate.safetensors"), type(gate).load(tmp_path / "gate.safetensors")):
        assert loaded.config() == gate.config()
        one, other = gate(rows(9)), loaded.eval()(rows(9))
        assert torch.equal(one.indices_TK, other.indices_TK)
        assert torch.equal(one.weights_TK, other.weights_TK)
    other_kind = gates.Hash if sample != "hash" else gates.TopK
    with pytest.raises(SpecMismatch, match="holds a gate of kind"):
        other_kind.load(tmp_path / "gate.safetensors")


@pytest.mark.parametrize("sample", SAMPLES)
def test_k_per_request_where_it_is_supported(sample: str) -> None:
    gate = make(sample)
    if not gate.k_per_request:
        with pytest.raises(InvalidRequest, match="does not take k"):
            gate(rows(3), k=1)
        return
    assert gate(rows(3), k=1).indices_TK.shape == (3, 1)
    for wrong in (0, EXPERTS + 1, -1):
        with pytest.raises(InvalidRequest, match="k is"):
            gate(rows(3), k=wrong)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_row_without_experts_is_an_error(sample: str) -> None:
    mask_TE = torch.ones(3, EXPERTS, dtype=torch.bool)
    mask_TE[1] = False
    with pytest.raises(InvalidRequest, match="row 1"):
        make(sample)(rows(3), mask_TE=mask_TE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sample", SAMPLES)
def test_scores_that_are_not_finite_are_an_error(sample: str, value: float) -> None:
    scores_TE = torch.randn(3, EXPERTS)
    scores_TE[2, 4] = value
    with pytest.raises(InvalidRequest, match="row 2"):
        make(sample).select(scores_TE)


def test_huge_finite_scores_are_no_error() -> None:
    routing = make("top_k").select(torch.full((2, EXPERTS), 3e38))
    assert routing.weights_TK.isfinite().all()


def test_shapes_that_do_not_fit() -> None:
    gate = make("top_k")
    with pytest.raises(SpecMismatch, match="7 features"):
        gate(torch.zeros(2, 7))
    with pytest.raises(SpecMismatch, match="scores have shape"):
        gate.select(torch.zeros(2, EXPERTS + 1))
    for mask in (torch.ones(3, EXPERTS + 1, dtype=torch.bool), torch.ones(3, EXPERTS), torch.ones(2, EXPERTS).bool()):
        with pytest.raises(SpecMismatch, match="mask"):
            gate(rows(3), mask_TE=mask)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("topk", {}, "did you mean 'top_k'"),
        ("top_k", {"in_featurs": 4, "num_experts": 4}, "did you mean 'in_features'"),
        ("top_k", {"in_features": 4}, "needs num_experts"),
        ("top_k", {"in_features": 4, "num_experts": 4, "k": 5}, "k is 5"),
        ("top_k", {"in_features": 4, "num_experts": 4, "k": "two"}, "wrong type"),
        ("top_k", {"in_features": 4, "num_experts": 4, "softmax": "between"}, "before"),
        ("top_k", {"in_features": 4, "num_experts": 4, "renormalize": False}, "softmax='before'"),
        ("sigmoid", {"in_features": 4, "num_experts": 4, "groups": 3}, "groups=3"),
        ("threshold", {"in_features": 4, "num_experts": 4, "threshold": 2}, "threshold 2"),
        ("top_p", {"in_features": 4, "num_experts": 4, "p": 0}, "p is 0"),
        ("expert_choice", {"in_features": 4, "num_experts": 4, "capacity_factor": 9}, "capacity_factor"),
        ("cosine", {"in_features": 4, "num_experts": 4, "temperature": 0}, "temperature"),
        ("fixed", {"weights": [1.0, math.nan]}, "finite"),
        ("fixed", {"weights": []}, "at least 1"),
        ("custom", {"scorer": "nowhere:Linear", "num_experts": 4}, "nowhere"),
    ],
)  # fmt: skip
def test_build_says_what_is_wrong(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        gates.build(name, **arguments)
    assert isinstance(caught.value, ConfigError) or "k is" in message


def test_build_knows_every_gate() -> None:
    assert set(gates.GATES) == {sample.partition(" ")[0] for sample in SAMPLES}


def test_a_custom_gate_takes_live_objects_but_does_not_save_them(tmp_path: Any) -> None:
    gate = gates.Custom(lambda x: x[:, :3] * 2, 3, k=1)
    assert gate(torch.tensor([[0.0, 5.0, 1.0, 9.0]])).indices_TK.tolist() == [[1]]
    with pytest.raises(InvalidRequest, match="import string"):
        gate.save(tmp_path / "gate.safetensors")
    with pytest.raises(SpecMismatch, match="scorer returned"):
        gates.Custom(lambda x: x, 3)(torch.zeros(2, 4))


# --- hash --------------------------------------------------------------------------------------------------------


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@MANY
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_hash_scores_are_the_formula(ids: list[int], seed: int) -> None:
    golden = 0x9E3779B97F4A7C15
    place = (golden + seed) % 2**64
    hashed = [mix((mix((x + place) % 2**64) + place) % 2**64) for x in ids]
    wanted = [[(mix(row ^ mix((e + 1) * golden % 2**64)) >> 40) / 2**24 for e in range(5)] for row in hashed]
    assert gates.Hash(5, seed=seed).scores(torch.tensor(ids)).tolist() == wanted


def test_hash_is_the_same_in_every_process_and_version() -> None:
    routing = gates.Hash(16, k=2, seed=3)(torch.tensor([0, 1, 2, 2**40, -7]))
    assert routing.indices_TK.tolist() == [[8, 7], [13, 4], [4, 6], [14, 11], [7, 1]]
    rows_of_floats = torch.tensor([[0.0, 1.5], [-0.0, 1.5]])
    assert len(set(gates.Hash(64)(rows_of_floats).indices_TK.flatten().tolist())) == 1


def test_hash_spreads_rows_and_denial_moves_only_the_denied() -> None:
    gate = gates.Hash(EXPERTS)
    ids = torch.arange(8000)
    before = gate(ids).indices_TK.flatten()
    assert torch.bincount(before).float().std() < 60
    after = gate(ids, mask_TE=torch.arange(EXPERTS) != 2).indices_TK.flatten()
    assert torch.equal(after[before != 2], before[before != 2])
    assert torch.bincount(after[before == 2], minlength=EXPERTS)[torch.arange(EXPERTS) != 2].min() > 80


def test_join_pads_and_counts() -> None:
    one = Routing(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.5]]))
    two = Routing(torch.tensor([[2]]), torch.tensor([[1.0]]), torch.tensor([3]))
    both = join([one, two])
    assert both.indices_TK.tolist() == [[1, 0], [2, -1]]
    assert both.weights_TK.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert both.dropped_T is not None
    assert both.dropped_T.tolist() == [0, 3]
    assert both.unrouted_T.tolist() == [False, False]
