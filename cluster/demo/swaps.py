"""The demo's swaps under traffic: one expert, two experts with the gate, a bad file that is refused, a rollback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...experts.errors import ExpertMeshError
from ...experts.weights.files import save_module, save_tensors
from ...router.gates import Gate
from ..client.client import Client
from ..client.reply import Reply
from ..rpc.swaps import SwapOutcome
from .features import Dataset
from .traffic import Traffic, TrafficReport
from .training import HIDDEN, Trained, train_dense, train_gate

TOLERANCE = 1e-4
PROBES = 256


@dataclass(frozen=True)
class SwapStep:
    """One swap under traffic and its outcome; `outcome` is None if it was refused, and `refusal` then says why."""

    title: str
    outcome: SwapOutcome | None
    refusal: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The swaps, and the traffic during them."""

    steps: tuple[SwapStep, ...]
    traffic: TrafficReport

    @property
    def ok(self) -> bool:
        """Whether all good swaps were committed, the bad file was refused, and no answer failed, was wrong or mixed."""
        *good, bad, rollback = self.steps
        committed = all(step.outcome is not None and step.outcome.committed for step in (*good, rollback))
        return committed and bad.outcome is None and self.traffic.ok


class Judge:
    """Checks replies: recomputes each one in this process from the versions that it names."""

    def __init__(self, layer: str, num_experts: int) -> None:
        self._layer = layer
        self._num_experts = num_experts
        self._models: dict[tuple[str, str], nn.Module] = {}

    def register(self, versions: dict[str, str], models: dict[str, nn.Module]) -> None:
        """Register the module behind the version of each id in `models`."""
        self._models |= {(id, versions[id]): model for id, model in models.items()}

    def __call__(self, x_TD: Tensor, reply: Reply) -> bool:
        """Whether the reply to these rows is correct."""
        gate_id = f"{self._layer}/gate"
        gate = self._models.get((gate_id, reply.versions.get(gate_id, "")))
        if not isinstance(gate, Gate):
            return False
        with torch.inference_mode():
            routing = gate(x_TD)
            weights_TE = torch.zeros(len(x_TD), self._num_experts).scatter(1, routing.indices_TK, routing.weights_TK)
            total = torch.zeros(())
            for expert in range(self._num_experts):
                if bool(weights_TE[:, expert].any()):
                    id = f"{self._layer}/e{expert}"
                    model = self._models.get((id, reply.versions.get(id, "")))
                    if model is None:
                        return False
                    total = total + weights_TE[:, expert, None] * model(x_TD)
        return bool(torch.allclose(total, reply.output, atol=TOLERANCE))


def swap_under_traffic(
    client: Client, layer: str, trained: Trained, data: Dataset, folder: Path, progress: Callable[[str], None]
) -> SwapReport:
    """Train replacements for three experts and the gate, then swap them in under traffic."""
    progress("training replacements for three experts and the gate")
    new = {number: train_dense(data, HIDDEN, seed=number) for number in (3, 1, 5)}
    experts = [new.get(number, expert) for number, expert in enumerate(trained.experts)]
    gate = train_gate(data, experts)
    judge = Judge(layer, len(experts))
    status = client.status()["layers"][layer]
    versions = {id: expert["version"] for id, expert in status["experts"].items()}
    versions[f"{layer}/gate"] = status["gate"]["version"]
    old: dict[str, nn.Module] = {f"{layer}/e{n}": expert for n, expert in enumerate(trained.experts)}
    judge.register(versions, old | {f"{layer}/gate": trained.gate})
    with Traffic(client, layer, data.held_x_TD[:PROBES], judge) as traffic:
        traffic.settle()
        traffic.phase("during swaps")
        models: dict[str, nn.Module] = {f"{layer}/e{n}": expert for n, expert in new.items()}
        steps = _swap_all(client, layer, judge, models, gate, folder, progress)
        traffic.settle(50)
    return SwapReport(steps, traffic.report())


def _swap_all(
    client: Client,
    layer: str,
    judge: Judge,
    models: dict[str, nn.Module],
    gate: Gate,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[SwapStep, ...]:
    files = {id: folder / f"{id.rpartition('/')[2]}-v2.safetensors" for id in models}
    for id, model in models.items():
        save_module(files[id], model)
    gate_file, gate_id = folder / "gate-v2.safetensors", f"{layer}/gate"
    gate.save(gate_file)
    single, *others = models

    progress(f"swapping {single}")
    one = client.swap({single: files[single]})
    judge.register(one.after, {single: models[single]})

    progress(f"swapping {', '.join(others)} and the gate in one transaction")
    several = client.swap({**{id: files[id] for id in others}, gate_id: gate_file})
    judge.register(several.after, {**{id: models[id] for id in others}, gate_id: gate})

    progress("trying to swap in a file that contains NaN")
    broken = {name: tensor.clone() for name, tensor in models[single].state_dict().items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_tensors(folder / "broken.safetensors", broken)
    unexpected: SwapOutcome | None = None
    reason = ""
    try:
        unexpected = client.swap({single: folder / "broken.safetensors"})
    except ExpertMeshError as error:
        reason = f"{type(error).__name__}: {error}"

    progress(f"rolling {single} back")
    rollback = client.rollback(single)
    return (
        SwapStep(f"swap of {single}", one),
        SwapStep(f"swap of {', '.join(others)} and the gate", several),
        SwapStep("swap of a bad file", unexpected, reason),
        SwapStep(f"rollback of {single}", rollback),
    )
