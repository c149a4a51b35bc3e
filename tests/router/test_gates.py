"""Properties that all gates share, and the input that they reject."""

from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gate_samples import EXPERTS, SAMPLES, chosen, close, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.errors import ConfigError, InvalidRequest, SpecMismatch
from expertmesh.router import gates
from expertmesh.router.gates import Gate, Routing, join

MANY = settings(max_examples=40, deadline=None)
SUMS_TO_ONE = ("top_k", "noisy_top_k", "threshold", "cosine", "hash", "custom", "sigmoid grouped")
SUMS_TO = dict.fromkeys(SUMS_TO_ONE, 1.0) | {"sigmoid": 2.5}
SUMS_TO_AT_MOST = {"top_k before": 1.0, "top_k grouped": 16.0, "switch": 1.0, "threshold softmax": 1.0, "top_p": 1.0}
LEARNED = [name for name in SAMPLES if name not in ("hash", "fixed")]


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
def test_denied_experts_count_as_absent(sample: str, seed: int, allowed: set[int]) -> None:
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
def test_the_choice_for_a_row_does_not_depend_on_the_batch(sample: str, count: int, seed: int, ties: bool) -> None:
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


def test_huge_finite_scores_are_accepted() -> None:
    routing = make("top_k").select(torch.full((2, EXPERTS), 3e38))
    assert routing.weights_TK.isfinite().all()


def test_shapes_that_do_not_fit_are_rejected() -> None:
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


def test_every_gate_of_the_folder_is_built_by_its_name_and_public() -> None:
    files = [importlib.import_module(f"{gates.__name__}.{file.name}") for file in pkgutil.iter_modules(gates.__path__)]
    classes = {kind for file in files for kind in vars(file).values() if isinstance(kind, type)}
    named = {kind for kind in classes if issubclass(kind, Gate) and "name" in vars(kind)}
    assert named == set(gates.GATES.values())
    assert {kind.__name__ for kind in named} <= set(gates.__all__)


def test_the_page_of_gates_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    assert [name for name in gates.GATES if f"\n| `{name}` | " not in page] == []


def test_a_custom_gate_takes_live_objects_but_does_not_save_them(tmp_path: Any) -> None:
    gate = gates.Custom(lambda x: x[:, :3] * 2, 3, k=1)
    assert gate(torch.tensor([[0.0, 5.0, 1.0, 9.0]])).indices_TK.tolist() == [[1]]
    with pytest.raises(InvalidRequest, match="import string"):
        gate.save(tmp_path / "gate.safetensors")
    with pytest.raises(SpecMismatch, match="scorer returned"):
        gates.Custom(lambda x: x, 3)(torch.zeros(2, 4))


# --- hash --------------------------------------------------------------------------------------------------------


def test_hash_is_the_same_in_every_process_and_version() -> None:
    routing = gates.Hash(16, k=2, seed=3)(torch.tensor([0, 1, 2, 2**40, -7]))
    assert routing.indices_TK.tolist() == [[8, 7], [13, 4], [4, 6], [14, 11], [7, 1]]
    rows_of_floats = torch.tensor([[0.0, 1.5], [-0.0, 1.5]])
    assert len(set(gates.Hash(64)(rows_of_floats).indices_TK.flatten().tolist())) == 1


def test_hash_spreads_rows_and_denying_an_expert_moves_only_its_rows() -> None:
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
