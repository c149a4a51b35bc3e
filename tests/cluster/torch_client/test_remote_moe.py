"""`RemoteMoE` has the gradients of the same layer in this process, through a client and through an attached router."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.trained import OUT, WIDTH, Trained, layer_of, module, rows, trained_cluster
from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh import ConfigError, RemoteMoE, gates
from expertmesh.experts.errors import InvalidRequest
from expertmesh.router.gates import Gate, Routing
from expertmesh.router.mixture.balance import load_balance_loss, z_loss
from expertmesh.router.mixture.capacity import Capacity
from expertmesh.router.mixture.local import LocalLayer

DOORS = ("client", "attached")
TWICE = torch.float64
GATES: dict[str, Callable[[], Gate]] = {
    "top_k": lambda: gates.TopK(WIDTH, 4, k=2),
    "switch": lambda: gates.Switch(WIDTH, 4),
    "cosine": lambda: gates.Cosine(WIDTH, 4, k=2, projection=8),
    "sigmoid": lambda: gates.Sigmoid(WIDTH, 4, k=2),
    "threshold": lambda: gates.Threshold(WIDTH, 4, 0.4),
    "top_p": lambda: gates.TopP(WIDTH, 4, 0.6),
    "expert_choice": lambda: gates.ExpertChoice(WIDTH, 4),
    "noisy_top_k": lambda: gates.NoisyTopK(WIDTH, 4, k=2).eval(),
}


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("double")
    with trained_cluster(folder, layer_of(folder, gates.TopK(WIDTH, 4, k=2), TWICE)) as running:
        yield running


def in_process(gate: nn.Module, count: int = 4, dtype: torch.dtype = TWICE, **options: object) -> LocalLayer:
    """The same layer in this process."""
    return LocalLayer(gate, [module(number, dtype) for number in range(count)], **options)  # type: ignore[arg-type]


def checked_gradients(moe: RemoteMoE, local: LocalLayer, x: Tensor) -> None:
    """Gradients by finite differences, and those of the layer in this process, for rows and the gate's parameters."""
    parameters = list(moe.parameters())
    inputs = (x.requires_grad_(True), *parameters)
    assert torch.autograd.gradcheck(lambda rows_T, *_: moe(rows_T), inputs, atol=1e-6)
    y, own = moe(x), local(x)
    assert torch.allclose(y, own, atol=1e-12)
    direction = torch.randn(y.shape, dtype=TWICE)
    found = torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((own * direction).sum(), inputs, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", GATES)
def test_every_gate_has_its_gradients(double: Trained, door: str, kind: str) -> None:
    torch.manual_seed(1)
    gate = GATES[kind]().double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    checked_gradients(RemoteMoE(double.doors[door], "l", gate=gate), in_process(gate), rows(3, 4, TWICE))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("combine", ["weighted_sum", "mean", "residual"])
def test_every_combination_has_its_gradients(double: Trained, door: str, combine: str) -> None:
    torch.manual_seed(2)
    gate = GATES["top_k"]().double()
    moe = RemoteMoE(double.doors[door], "l", gate=gate, combine=combine, capacity=Capacity(factor=1.0))
    checked_gradients(moe, in_process(gate, method=combine, capacity=Capacity(factor=1.0)), rows(4, 5, TWICE))


def test_shared_experts_and_dropped_rows_are_those_of_the_layer(tmp_path: Path) -> None:
    gate = gates.Switch(WIDTH, 2).double()
    capacity = Capacity(factor=0.5, minimum=1)
    layer = layer_of(tmp_path, gate, TWICE, shared=("s",), on_dropped="residual")
    with trained_cluster(tmp_path, layer) as running:
        moe = RemoteMoE(running.client, "l", gate=gate, capacity=capacity)
        local = in_process(gate, 2, shared=module(2, TWICE), capacity=capacity, on_dropped="residual")
        x = rows(5, 6, TWICE)
        direction = torch.randn(6, OUT, dtype=TWICE)
        for one, other in zip(*(gradients_of(layer, x, direction) for layer in (moe, local)), strict=True):
            assert torch.allclose(one, other, atol=1e-10)


def gradients_of(layer: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), [x])]


@pytest.mark.parametrize("door", DOORS)
def test_forty_steps_have_the_losses_of_the_layer_in_this_process(tmp_path: Path, door: str) -> None:
    gate = gates.TopK(WIDTH, 4, k=2)
    nn.init.normal_(gate.weight)
    twin = gates.TopK(WIDTH, 4, k=2)
    twin.load_state_dict(gate.state_dict())
    with trained_cluster(tmp_path, layer_of(tmp_path, gate)) as running:
        local = in_process(twin, dtype=torch.float32)
        own = torch.optim.AdamW(local.experts.parameters(), lr=1e-2)
        gates_optimizers = [torch.optim.AdamW(g.parameters(), lr=1e-2) for g in (gate, twin)]
        wanted_T = torch.sin(rows(0, 64) * 2)
        options = {"optimizer": "torch.optim:AdamW", "lr": 1e-2, "clip_norm": 0.5, "durable_every": 50}
        with running.doors[door].train("l", **options) as session:
            moe = RemoteMoE(running.doors[door], "l", gate=gate, session=session)
            losses: list[tuple[float, float]] = []
            for number in range(40):
                x = rows(0, 64)[number % 2 :: 2]
                loss, local_loss = (F.mse_loss(layer(x), wanted_T[number % 2 :: 2]) for layer in (moe, local))
                for optimizer in (*gates_optimizers, own):
                    optimizer.zero_grad()
                loss.backward()
                local_loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(local.experts.parameters(), 0.5)
                told = session.step()
                assert told.norm == pytest.approx(float(norm), rel=1e-3)
                for optimizer in (*gates_optimizers, own):
                    optimizer.step()
                losses.append((float(loss.detach()), float(local_loss.detach())))
            assert (session.step_count, session.durable) == (40, 0)
        assert max(abs(one - other) / other for one, other in losses) <= 1e-4
        assert losses[-1][0] < losses[0][0]


def test_what_a_call_tells(double: Trained) -> None:
    gate = GATES["top_k"]().double()
    moe = RemoteMoE(double.client, "l", gate=gate)
    with pytest.raises(InvalidRequest, match="call the module first"):
        _ = moe.aux_loss
    x = rows(6, 10, TWICE)
    moe(x)
    routing = gate(x)
    assert moe.load.tolist() == torch.bincount(routing.indices_TK.flatten(), minlength=4).tolist()
    assert torch.equal(moe.aux_loss, load_balance_loss(gate.scores(x).softmax(dim=1), routing))
    assert torch.equal(moe.z_loss, z_loss(gate.scores(x)))
    (moe.aux_loss + moe.z_loss).backward()
    assert float(gate.weight.grad.abs().sum()) > 0


def test_the_bias_of_a_gate_follows_the_load(double: Trained) -> None:
    gate = gates.Sigmoid(WIDTH, 4, k=1).double()
    moe = RemoteMoE(double.client, "l", gate=gate)
    first, second = moe(rows(1, 10, TWICE)), moe(rows(2, 10, TWICE))
    assert first.shape == second.shape
    load_E = sum((F.one_hot(gate(rows(n, 10, TWICE)).indices_TK[:, 0], 4).sum(dim=0) for n in (1, 2)), torch.zeros(4))
    moe.update_bias(0.1)
    assert torch.allclose(gate.expert_bias.float(), 0.1 * (load_E.mean() - load_E).sign())
    moe.eval()(rows(3, 10, TWICE))  # evaluation is no load
    before = gate.expert_bias.clone()
    moe.update_bias(0.1)
    assert torch.equal(gate.expert_bias, before)
    with pytest.raises(InvalidRequest, match="has no expert_bias"):
        RemoteMoE(double.client, "l", gate=GATES["top_k"]().double()).update_bias()


def test_the_callers_own_routing(double: Trained) -> None:
    moe = RemoteMoE(double.client, "l")
    x = rows(7, 3, TWICE)
    indices = torch.tensor([[0, 0], [3, -1], [1, 2]])  # one expert twice: its weights add up
    weights = torch.tensor([[0.5, 0.25], [2.0, 0.0], [1.0, -1.0]], dtype=TWICE, requires_grad=True)
    y = moe(x, indices=indices, weights=weights)
    experts = [module(number, TWICE) for number in range(4)]
    wanted = torch.stack([0.75 * experts[0](x[0]), 2 * experts[3](x[1]), experts[1](x[2]) - experts[2](x[2])])
    assert torch.allclose(y, wanted)
    (gradient,) = torch.autograd.grad(y.sum(), weights)
    assert torch.allclose(gradient[0], experts[0](x[0]).sum().expand(2))
    assert gradient[1, 1] == 0


def test_rows_without_an_expert_are_zero_rows_of_the_answers(double: Trained) -> None:
    moe = RemoteMoE(double.client, "l")
    moe(rows(1, 2, TWICE), indices=torch.zeros(2, 1, dtype=torch.int64), weights=torch.ones(2, 1))
    y = moe(rows(1, 3, TWICE).int(), indices=torch.full((3, 1), -1), weights=torch.ones(3, 1))
    assert torch.equal(y, torch.zeros(3, OUT, dtype=TWICE))


def test_a_module_whose_experts_are_elsewhere_is_not_copied(double: Trained) -> None:
    moe = RemoteMoE(double.client, "l", gate=GATES["top_k"]())
    with pytest.raises(TypeError, match="its experts are in a cluster"):
        copy.deepcopy(moe)
    assert set(moe.state_dict()) == {"gate.weight"}
    with pytest.raises(ConfigError, match="not a Routing"):
        RemoteMoE(double.client, "l", gate=nn.Linear(WIDTH, 4).double())(rows(1, 2, TWICE))


def test_a_batch_without_rows(double: Trained) -> None:
    moe = RemoteMoE(double.client, "l", gate=GATES["top_k"]().double())
    x = rows(1, 0, TWICE).requires_grad_(True)
    moe(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, WIDTH)


def test_what_does_not_fit_is_refused(double: Trained) -> None:
    with pytest.raises(ConfigError, match="chooses among 3 experts, but layer l has 4"):
        RemoteMoE(double.client, "l", gate=gates.TopK(WIDTH, 3))
    with pytest.raises(ConfigError, match="no gradient"):
        RemoteMoE(double.client, "l", combine="vote")
    moe = RemoteMoE(double.client, "l")
    x = rows(8, 3, TWICE)
    with pytest.raises(InvalidRequest, match="give the module a gate"):
        moe(x)
    with pytest.raises(InvalidRequest, match=r"must both be \[T, K\]"):
        moe(x, indices=torch.zeros(3, 2, dtype=torch.int64), weights=torch.ones(3, 1))
    with pytest.raises(InvalidRequest, match="the routing has 2 rows, but x has 3"):
        moe(x, indices=torch.zeros(2, 1, dtype=torch.int64), weights=torch.ones(2, 1))
    with pytest.raises(InvalidRequest, match="expert indices go from 0 to 3"):
        moe(x, indices=torch.full((3, 1), 4), weights=torch.ones(3, 1))
    assert isinstance(RemoteMoE(double.client, "l", gate=Plain())(x), Tensor)


class Plain(nn.Module):
    """A gate of the caller's own."""

    def forward(self, x: Tensor) -> Routing:
        return Routing(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))
