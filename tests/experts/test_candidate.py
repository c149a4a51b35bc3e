"""A candidate learns exactly once per step, goes back to what was saved bit for bit, and leaves what serves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.errors import ConfigError, DataLoss, FailedPrecondition, InvalidRequest, SpecMismatch
from expertmesh.experts.training.candidate import Candidate, TrainedBy
from expertmesh.experts.training.ledger import KEPT_RESULTS, OTHER_PASSES, Ledger, OutOfStep, chain
from expertmesh.experts.training.optimizer import build_optimizer, known_optimizers
from expertmesh.experts.training.passes import backward, forward
from expertmesh.experts.weights.files import tensors_from_bytes, tensors_to_bytes

ADAM = TrainedBy("torch.optim:AdamW", {"lr": 0.01})


def module(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 3))


def rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, gradients = (torch.randn(5, width, generator=generator) for width in (4, 3))
    return x, gradients, torch.rand(5, generator=generator)


def state_of(candidate: Candidate) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in candidate.module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step(candidate: Candidate, number: int, passes: int = 1) -> dict[str, object]:
    for at in range(passes):
        candidate.backward(*rows(10 * number + at), number, at, seed=at)
    return update(candidate, number, range(passes))


def update(candidate: Candidate, number: int, seeds: Iterable[int], lr: float | None = None) -> dict[str, object]:
    made_of = list(seeds)
    return candidate.update(number, len(made_of), chain(made_of), lr, 1.0)


def test_a_candidate_computes_what_torch_computes() -> None:
    own = module(dropout=0.5)
    candidate = Candidate(own, ADAM, torch.float32)
    twin = copy.deepcopy(own).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for number in range(1, 6):
        x, gradients, weights = rows(number)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            x_twin = x.clone().requires_grad_(True)
            y = twin(x_twin)
        assert torch.equal(candidate.forward(x, number, number), y)
        ((y * gradients).sum(dim=1) * weights).sum().backward()
        found = candidate.backward(x, gradients, weights, number, 0, number)
        assert torch.allclose(found.rows_n, x_twin.grad)
        assert torch.allclose(found.weights_n, (y * gradients).sum(dim=1))
        optimizer.step()
        optimizer.zero_grad()
        update(candidate, number, [number])
    for name, tensor in twin.state_dict().items():
        assert torch.allclose(candidate.module.state_dict()[name], tensor), name
    assert not own.training or own.state_dict()["1.num_batches_tracked"] == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.booleans()), min_size=1, max_size=6)
)
def test_repeated_messages_and_restored_states_change_nothing(plan: list[tuple[int, int, int, bool]]) -> None:
    """For each step: how many passes, how often each is sent, how often the update is, and whether it starts anew."""
    plain, tried = (Candidate(module(0.3), ADAM, torch.float32) for _ in range(2))
    for number, (passes, times, updates, anew) in enumerate(plan, 1):
        expected = step(plain, number, passes)
        if anew:
            saved = tried.state()
            tried = Candidate(module(0.3), ADAM, torch.float32)
            tried.restore(saved)
        for at in range(passes):
            answers = [tried.backward(*rows(10 * number + at), number, at, seed=at) for _ in range(times)]
            assert all(torch.equal(answer.rows_n, answers[0].rows_n) for answer in answers)
        assert [update(tried, number, range(passes)) for _ in range(updates)] == [expected] * updates
        for before in range(1, number):
            assert update(tried, before, range(plan[before - 1][0]))  # a late one gets its own result
        assert same(state_of(plain), state_of(tried))
    assert (tried.ledger.applied, tried.ledger.updates) == (len(plan), len(plan))


def test_a_forward_pass_changes_nothing_but_what_it_returns() -> None:
    candidate = Candidate(module(0.5), ADAM, torch.float32)
    before = state_of(candidate)
    one, two = (candidate.forward(rows(1)[0], 1, seed) for seed in (1, 2))
    assert same(before, state_of(candidate))
    assert not torch.equal(one, two)
    assert torch.equal(one, candidate.forward(rows(1)[0], 1, 1))


@pytest.mark.parametrize("of_rows", [True, False])
def test_a_kept_forward_pass_has_the_gradients_of_a_repeated_one(of_rows: bool) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))

    kept, repeated = (Candidate(plain(), ADAM, torch.float32) for _ in range(2))
    for number in range(1, 4):
        for at in range(6):  # more than are kept
            x, _, _ = rows(10 * number + at)
            answers = [c.forward(x, number, at, keep=4 * (c is kept), of_rows=of_rows) for c in (kept, repeated)]
            assert torch.equal(*answers)
        for at in range(6):
            found = [c.backward(*rows(10 * number + at), number, at, at, of_rows=of_rows) for c in (kept, repeated)]
            assert (found[0].rows_n is not None) == of_rows
            assert not of_rows or torch.equal(found[0].rows_n, found[1].rows_n)
            assert torch.equal(found[0].weights_n, found[1].weights_n)
        assert update(kept, number, range(6)) == update(repeated, number, range(6))
        assert same(state_of(kept), state_of(repeated))


def test_what_does_not_follow_is_told_and_not_done() -> None:
    candidate = Candidate(module(), ADAM, torch.float32)
    before = state_of(candidate)
    x, gradients, weights = rows(1)
    for refused in (
        lambda: candidate.forward(x, 2, 0),
        lambda: candidate.backward(x, gradients, weights, 2, 0, 0),
        lambda: candidate.backward(x, gradients, weights, 1, 1, 0),
        lambda: update(candidate, 2, []),
        lambda: update(candidate, 1, [0]),
    ):
        with pytest.raises(OutOfStep) as told:
            refused()
        assert (told.value.applied, told.value.passes) == (0, 0)
    assert same(before, state_of(candidate))
    step(candidate, 1)
    with pytest.raises(InvalidRequest, match="another update"):
        update(candidate, 1, [0], 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_update_nothing(bad: float) -> None:
    candidate = Candidate(module(), ADAM, torch.float32)
    x, gradients, weights = rows(1)
    before = state_of(candidate)["4.weight"]
    candidate.backward(x, gradients * bad, weights, 1, 0, 0)
    with pytest.raises(FailedPrecondition, match="not finite"):
        update(candidate, 1, [0])
    assert torch.equal(before, state_of(candidate)["4.weight"])
    candidate.forget_gradients(1)
    step(candidate, 1)
    assert not torch.equal(before, state_of(candidate)["4.weight"])


def test_a_step_without_rows_counts_and_changes_nothing() -> None:
    candidate = Candidate(module(), ADAM, torch.float32)
    before = state_of(candidate)
    update(candidate, 1, [])
    assert same(before, state_of(candidate))
    assert (candidate.ledger.applied, candidate.ledger.updates) == (1, 0)


def test_weights_of_the_caller_are_a_step_of_their_own() -> None:
    candidate = Candidate(module(), TrainedBy(None), torch.float32)
    candidate.backward(*rows(1), 1, 0, 0)
    named, _ = tensors_from_bytes(candidate.gradients(1, 1, chain([0])))
    assert named.keys() == dict(candidate.module.named_parameters()).keys()
    weights, _ = tensors_from_bytes(candidate.weights())
    weights["4.bias"] += 1
    for _ in range(2):
        candidate.load(1, tensors_to_bytes(weights))
        assert torch.equal(candidate.module.state_dict()["4.bias"], weights["4.bias"])
    with pytest.raises(SpecMismatch, match="not finite"):
        candidate.load(2, tensors_to_bytes({**weights, "4.bias": weights["4.bias"] * float("nan")}))
    with pytest.raises(SpecMismatch, match="missing"):
        candidate.load(2, tensors_to_bytes({"4.bias": weights["4.bias"]}))
    with pytest.raises(FailedPrecondition, match="no optimizer"):
        update(candidate, 2, [])
    assert candidate.ledger.applied == 1


def test_a_saved_state_that_is_cut_off_is_data_loss() -> None:
    candidate = Candidate(module(), ADAM, torch.float32)
    step(candidate, 1)
    saved = candidate.state()
    for damaged in (saved[:-5], b"", saved[:20], tensors_to_bytes({"weights.x": torch.ones(1)})):
        with pytest.raises(DataLoss):
            Candidate(module(), ADAM, torch.float32).restore(damaged)


def test_who_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        Candidate(nn.ReLU(), ADAM, None)
    with pytest.raises(ConfigError, match=r"did you mean 'torch\.optim:AdamW'"):
        Candidate(module(), TrainedBy("torch.optim:AdmW"), None)
    with pytest.raises(ConfigError, match=r"not one of torch\.optim"):
        Candidate(module(), TrainedBy("os:system"), None)
    with pytest.raises(ConfigError, match="takes no argument 'rate'"):
        Candidate(module(), TrainedBy("torch.optim:SGD", {"rate": 1}), None)
    with pytest.raises(ConfigError, match="refuses its arguments"):
        Candidate(module(), TrainedBy("torch.optim:SGD", {"lr": -1.0}), None)


@pytest.mark.parametrize("name", known_optimizers())
def test_every_optimizer_that_may_be_named_survives_being_saved(name: str) -> None:
    if name in ("torch.optim:SparseAdam", "torch.optim:Muon"):
        pytest.skip("takes only sparse gradients, or matrices")
    plain, saved = (Candidate(nn.Linear(4, 3), TrainedBy(name), torch.float32) for _ in range(2))
    saved.module.load_state_dict(plain.module.state_dict())
    for number in range(1, 5):
        step(plain, number)
        anew = Candidate(nn.Linear(4, 3), TrainedBy(name), torch.float32)
        anew.restore(saved.state())
        saved = anew
        step(saved, number)
    assert same(state_of(plain), state_of(saved))


def test_optimizers_are_of_torch_alone() -> None:
    assert {"torch.optim:AdamW", "torch.optim:SGD"} <= set(known_optimizers())
    assert "torch.optim:Optimizer" not in known_optimizers()
    assert build_optimizer("AdamW", nn.Linear(2, 2).parameters(), {"betas": [0.5, 0.9]}).defaults["betas"] == (0.5, 0.9)


def test_passes_of_somebody_else_are_told_and_are_no_part_of_an_update() -> None:
    """As after a pass whose answer was lost and whose caller began anew, or with two who hold one session."""
    candidate, plain = (Candidate(module(), ADAM, torch.float32) for _ in range(2))
    candidate.backward(*rows(1), 1, 0, seed=7)
    for refused in (
        lambda: candidate.backward(*rows(2), 1, 0, seed=8),
        lambda: update(candidate, 1, []),
        lambda: update(candidate, 1, [8]),
        lambda: candidate.gradients(1, 1, chain([8])),
    ):
        with pytest.raises(OutOfStep) as told:
            refused()
        assert told.value.passes == OTHER_PASSES
    candidate.forget_gradients(1)
    for one in (candidate, plain):
        one.backward(*rows(2), 1, 0, seed=8)
        update(one, 1, [8])
    assert same(state_of(candidate), state_of(plain))


class Counting(nn.Module):
    """Counts its rows in a buffer that it replaces, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("n", torch.zeros(()))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + len(x)
        if self.fails:
            raise RuntimeError("told to")
        y: Tensor = self.linear(x)
        return y


def test_buffers_count_each_step_once() -> None:
    candidate = Candidate(Counting(), ADAM, torch.float32)
    inner = candidate.module
    candidate.forward(rows(1)[0], 1, 0, keep=4)
    candidate.backward(*rows(1), 1, 0, 0)
    candidate.backward(*rows(1), 1, 0, 0)
    assert float(inner.n) == 5
    inner.fails = True
    with pytest.raises(RuntimeError):
        candidate.backward(*rows(2), 1, 1, 1)
    inner.fails = False
    assert (float(inner.n), candidate.ledger.passes) == (5, 1)
    candidate.forget_gradients(1)
    assert float(inner.n) == 0
    candidate.backward(*rows(1), 1, 0, 0)
    update(candidate, 1, [0])
    candidate.forget_gradients(2)
    assert float(inner.n) == 5


def test_what_a_constructor_froze_stays_as_it_is() -> None:
    candidate = Candidate(module(), ADAM, torch.float32, frozen={"0.weight", "0.bias"})
    before = state_of(candidate)
    step(candidate, 1)
    changed = {name for name, tensor in state_of(candidate).items() if not torch.equal(tensor, before[name])}
    assert changed.isdisjoint({"0.weight", "0.bias"})
    assert "4.weight" in changed


def test_other_weights_are_another_update() -> None:
    candidate = Candidate(module(), TrainedBy(None), torch.float32)
    weights, _ = tensors_from_bytes(candidate.weights())
    candidate.load(1, tensors_to_bytes(weights))
    with pytest.raises(InvalidRequest, match="another update"):
        candidate.load(1, None)


def test_results_are_kept_for_a_while() -> None:
    ledger = Ledger()
    for number in range(1, KEPT_RESULTS + 3):
        ledger.record(number, {"passes": 0}, {"of": number})
    assert ledger.recorded(KEPT_RESULTS, {"passes": 0}) == {"of": KEPT_RESULTS}
    with pytest.raises(FailedPrecondition, match="not kept"):
        ledger.recorded(1, {"passes": 0})
    assert Ledger.of(ledger.document()) == ledger


def test_a_function_without_gradients_is_told() -> None:
    x, gradients = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(FailedPrecondition, match="not differentiable"):
        backward(lambda rows_n: torch.zeros_like(rows_n), x, gradients, None, (), None)
    with pytest.raises(SpecMismatch, match="shape"):
        backward(torch.sin, x, gradients[:, :2], None, (), None)
    with pytest.raises(SpecMismatch, match="a row for each of 2 rows"):
        forward(lambda rows_n: rows_n[:1], x, None)
    found = backward(torch.sin, x, gradients, torch.tensor([2.0, 0.0]), (), None)
    assert torch.allclose(found.rows_n, x.cos() * torch.tensor([[2.0], [0.0]]))
    assert torch.allclose(found.weights_n, x.sin().sum(dim=1))
