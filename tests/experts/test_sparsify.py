"""Sparsified experts: as many zeros as asked for, in the right places, the same state, and measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.errors import ConfigError, SpecMismatch
from expertmesh.experts.modules import FeedForward, PackedExperts
from expertmesh.experts.transform.sparsify import sparsify
from expertmesh.experts.weights.files import load_into, load_tensors, tensor_digest

WIDTH, HIDDEN = 8, 16


def expert(seed: int = 0, **options: Any) -> FeedForward:
    torch.manual_seed(seed)
    return FeedForward(WIDTH, HIDDEN, **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.dim() > 1}


def unchanged_where_not_zero(before: nn.Module, after: nn.Module) -> bool:
    pairs = [(before.state_dict()[name], tensor) for name, tensor in after.state_dict().items()]
    return all(bool(((new == old) | (new == 0)).all()) for old, new in pairs)


@given(
    kind=st.sampled_from(["random", "magnitude"]),
    amount=st.floats(0, 1),
    scope=st.sampled_from(["tensor", "model"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_the_share_of_zeros_is_the_amount(kind: str, amount: float, scope: str, seed: int) -> None:
    dense = expert(seed)
    digest = tensor_digest(dense.state_dict())
    sparse, report = sparsify(dense, kind, amount=amount, scope=scope, seed=seed)
    again, _ = sparsify(dense, kind, amount=amount, scope=scope, seed=seed)
    assert tensor_digest(dense.state_dict()) == digest
    assert tensor_digest(again.state_dict()) == tensor_digest(sparse.state_dict())
    assert unchanged_where_not_zero(dense, sparse)
    assert report.zeros.after == (2 * round(amount * 128) if scope == "tensor" else round(amount * 256))
    assert report.zeros.after == sum(int((tensor == 0).sum()) for tensor in weights(sparse).values())
    assert report.zeros.after == sum(change.after or 0 for change in report.zeros_by_tensor.values())
    assert list(sparse.state_dict()) == list(dense.state_dict())
    if kind == "magnitude" and scope == "model":
        kept = [t[t != 0].abs().min() for t in weights(sparse).values() if bool((t != 0).any())]
        pruned = [w[t == 0].abs().max() for w, t in zip(weights(dense).values(), weights(sparse).values(), strict=True)
                  if bool((t == 0).any())]  # fmt: skip
        assert not kept or not pruned or max(pruned) <= min(kept)


@given(threshold=st.floats(0, 0.5), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_what_is_at_most_the_threshold_becomes_zero(threshold: float, seed: int) -> None:
    dense = expert(seed)
    sparse, _ = sparsify(dense, "threshold", threshold=threshold)
    for name, tensor in weights(dense).items():
        torch.testing.assert_close(sparse.state_dict()[name], tensor.where(tensor.abs() > threshold, 0.0))
    assert torch.equal(sparse.state_dict()["up_proj.bias"], dense.up_proj.bias)


@given(n_m=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_n_of_every_m_are_kept_and_they_are_the_largest(n_m: tuple[int, int], seed: int) -> None:
    n, m = n_m
    dense = expert(seed)
    sparse, report = sparsify(dense, f"{n}:{m}")
    for name, tensor in weights(sparse).items():
        groups, before = tensor.reshape(-1, m), weights(dense)[name].reshape(-1, m)
        assert bool(((groups != 0).sum(dim=1) == n).all())
        kept, dropped = before.abs().where(groups != 0, torch.inf), before.abs().where(groups == 0, 0.0)
        assert bool((kept.min(dim=1).values >= dropped.max(dim=1).values).all())
    assert report.zeros.after == report.elements * (m - n) // m


def test_stacked_experts_are_pruned_along_their_inputs() -> None:
    packed = PackedExperts(3, WIDTH, HIDDEN, transposed=True)
    sparse, report = sparsify(packed, "2:4", dim=-2, rows=torch.randn(5, WIDTH), repeats=1)
    stack = sparse.get_parameter("down_proj")
    assert bool(((stack.reshape(3, HIDDEN // 4, 4, WIDTH) != 0).sum(dim=2) == 2).all())
    assert report.max_abs is not None
    assert report.max_abs > 0


def test_tied_weights_stay_tied_and_named_tensors_alone_change() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    sparse, report = sparsify(tied, "magnitude", amount=0.5)
    assert sparse.get_parameter("0.weight") is sparse.get_parameter("1.weight")
    assert report.elements == 16
    _, report = sparsify(expert(), "random", amount=1, tensors=["up_proj.bias"])
    assert dict(report.zeros_by_tensor) == {"up_proj.bias": report.zeros}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [("magnitude", {"amount": 0.5}), ("random", {"amount": 0.5}), ("2:4", {})])
def test_every_dtype_keeps_its_own(dtype: torch.dtype, options: tuple[str, dict[str, Any]]) -> None:
    sparse, report = sparsify(expert().to(dtype), options[0], **options[1])
    assert {tensor.dtype for tensor in sparse.state_dict().values()} == {dtype}
    assert report.zeros.after == report.elements // 2


def test_s5_a_sparsified_expert_replaces_the_dense_one(tmp_path: Path) -> None:
    """Size, speed and error are shown, and the file fits the factory of the dense expert."""
    dense, rows = expert(), torch.randn(32, WIDTH)
    path = tmp_path / "sparse.safetensors"
    sparse, report = sparsify(dense, "magnitude", amount=0.75, rows=rows, repeats=3, path=path)
    taken = FeedForward(WIDTH, HIDDEN)
    load_into(taken, load_tensors(path)[0], "weights")
    torch.testing.assert_close(taken(rows), sparse(rows))
    difference = (dense(rows) - taken(rows)).detach()
    assert report.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-5)
    assert report.relative_l2 == pytest.approx(float(difference.norm() / dense(rows).detach().norm()), rel=1e-4)
    assert report.seconds is not None
    assert min(report.seconds.before or 0, report.seconds.after or 0) > 0
    assert report.file_bytes.before == report.file_bytes.after == path.stat().st_size  # zeros are stored
    assert (report.compressed_bytes.after or 0) < (report.compressed_bytes.before or 0)
    assert [*tmp_path.iterdir()] == [path]
    assert json.loads(json.dumps(report.as_dict()))["zeros"] == {"before": 0, "after": 192}
    text = str(report)
    assert text.splitlines()[0].startswith("kind magnitude 0.75, scope tensor, elements 256")
    assert any(line.split() == ["zeros", "0", "192"] for line in text.splitlines())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_bytes_are_those_of_csr() -> None:
    sparse, report = sparsify(expert(), "magnitude", amount=0.9)
    total = 4 * (HIDDEN + WIDTH)  # the biases
    for tensor in weights(sparse).values():
        csr = tensor.to_sparse_csr()
        indices = csr.crow_indices().numel() + csr.col_indices().numel()
        total += 4 * indices + 4 * csr.values().numel()
    assert report.sparse_bytes.after == total
    assert (report.sparse_bytes.before or 0) > 1.9 * 4 * 256  # dense tensors stored as sparse ones are larger


def with_nan() -> FeedForward:
    broken = expert()
    nn.init.constant_(broken.up_proj.weight, torch.nan)
    return broken


@pytest.mark.parametrize(
    ("module", "kind", "options", "error", "message"),
    [
        (expert, "smallest", {"amount": 0.5}, ConfigError, "kind is 'smallest', but must be one of random, magnitude"),
        (expert, "magnitude", {}, ConfigError, "'magnitude' takes amount; got amount=None"),
        (expert, "threshold", {"amount": 0.5}, ConfigError, "'threshold' takes threshold; got amount=0.5"),
        (expert, "2:4", {"amount": 0.5}, ConfigError, "takes neither amount nor threshold"),
        (expert, "4:4", {}, ConfigError, "N must be at least 1 and below M"),
        (expert, "random", {"amount": 1.5}, ConfigError, "amount is 1.5, but must be a share between 0 and 1"),
        (expert, "threshold", {"threshold": -1.0}, ConfigError, "threshold is -1.0"),
        (expert, "random", {"amount": 0.5, "scope": "all"}, ConfigError, "scope is 'all'"),
        (expert, "random", {"amount": 0.5, "tensors": ["up"]}, ConfigError, "no parameter 'up'; its .* up_proj"),
        (nn.ReLU, "random", {"amount": 0.5}, ConfigError, "nothing to sparsify in ReLU"),
        (expert, "2:5", {}, SpecMismatch, r"'up_proj.weight' has shape \[16, 8\], but 2:5 needs dimension -1"),
        (expert, "2:4", {"dim": 2}, SpecMismatch, "needs dimension 2"),
        (with_nan, "random", {"amount": 0.5}, SpecMismatch, "'up_proj.weight' has NaN or infinite values"),
        (expert, "random", {"amount": 0, "rows": torch.zeros(1, WIDTH), "repeats": 0}, ConfigError, "repeats is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(module: Any, kind: str, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparsify(module(), kind, **options)
