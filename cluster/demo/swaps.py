"""The demo's swaps under traffic: one expert, then a set with the gate, a bad file that is refused, and a rollback."""

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
from .training import Trained, train_expert, train_gate

TOLERANCE = 1e-4
PROBES = 256


@dataclass(frozen=True)
class Step:
    """One thing that was done under traffic, and what came of it: versions before and after, or why it was refused."""

    what: str
    outcome: SwapOutcome | None
    refusal: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The steps, and the traffic that went on meanwhile."""

    steps: tuple[Step, ...]
    traffic: TrafficReport

    @property
    def ok(self) -> bool:
        """Whether every good swap was committed, the bad file refused, and no answer failed, was wrong or mixed."""
        *good, bad, back = self.steps
        committed = all(step.outcome is not None and step.outcome.committed for step in (*good, back))
        return committed and bad.outcome is None and self.traffic.ok


class Judge:
    """Computes here what the versions that a reply names must have answered."""

    def __init__(self, layer: str, count: int) -> None:
        self._layer = layer
        self._count = count
        self._models: dict[tuple[str, str], nn.Module] = {}

    def knows(self, versions: dict[str, str], models: dict[str, nn.Module]) -> None:
        """Which module is behind a version of each id."""
        self._models |= {(id, versions[id]): model for id, model in models.items()}

    def __call__(self, x_TD: Tensor, reply: Reply) -> bool:
        """Whether the reply to these rows is right."""
        gate_id = f"{self._layer}/gate"
        gate = self._models.get((gate_id, reply.versions.get(gate_id, "")))
        if not isinstance(gate, Gate):
            return False
        with torch.inference_mode():
            routing = gate(x_TD)
            weights_TE = torch.zeros(len(x_TD), self._count).scatter(1, routing.indices_TK, routing.weights_TK)
            total = torch.zeros(())
            for expert in range(self._count):
                if bool(weights_TE[:, expert].any()):
                    id = f"{self._layer}/e{expert}"
                    model = self._models.get((id, reply.versions.get(id, "")))
                    if model is None:
                        return False
                    total = total + weights_TE[:, expert, None] * model(x_TD)
        return bool(torch.allclose(total, reply.output, atol=TOLERANCE))


def swap_under_traffic(
    client: Client, layer: str, trained: Trained, data: Dataset, folder: Path, say: Callable[[str], None]
) -> SwapReport:
    """Train replacements, then swap them in while requests go on."""
    say("training replacements for three experts, and a gate for them")
    everything = torch.ones(len(data.train_y_T), dtype=torch.bool)
    better = {number: train_expert(data, everything) for number in (3, 1, 5)}
    experts = [better.get(number, expert) for number, expert in enumerate(trained.experts)]
    gate = train_gate(data, experts, trained.centres_ED)
    judge = Judge(layer, len(experts))
    status = client.status()["layers"][layer]
    versions = {id: expert["version"] for id, expert in status["experts"].items()}
    versions[f"{layer}/gate"] = status["gate"]["version"]
    first: dict[str, nn.Module] = {f"{layer}/e{n}": expert for n, expert in enumerate(trained.experts)}
    judge.knows(versions, first | {f"{layer}/gate": trained.gate})
    with Traffic(client, layer, data.held_x_TD[:PROBES], judge) as traffic:
        traffic.settle()
        traffic.phase("during swaps")
        steps = _steps(client, layer, judge, {f"{layer}/e{n}": model for n, model in better.items()}, gate, folder, say)
        traffic.settle(50)
    return SwapReport(steps, traffic.report())


def _steps(
    client: Client,
    layer: str,
    judge: Judge,
    better: dict[str, nn.Module],
    gate: Gate,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[Step, ...]:
    files = {id: folder / f"{id.rpartition('/')[2]}-v2.safetensors" for id in better}
    for id, model in better.items():
        save_module(files[id], model)
    gate_file, gate_id = folder / "gate-v2.safetensors", f"{layer}/gate"
    gate.save(gate_file)
    single, *others = better

    say(f"swapping {single}")
    one = client.swap({single: files[single]})
    judge.knows(one.after, {single: better[single]})

    say(f"swapping {', '.join(others)} and the gate in one transaction")
    several = client.swap({**{id: files[id] for id in others}, gate_id: gate_file})
    judge.knows(several.after, {**{id: better[id] for id in others}, gate_id: gate})

    say("trying a file with a number that is not finite")
    broken = {name: tensor.clone() for name, tensor in better[single].state_dict().items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_tensors(folder / "broken.safetensors", broken)
    refused: SwapOutcome | None = None
    reason = ""
    try:
        refused = client.swap({single: folder / "broken.safetensors"})
    except ExpertMeshError as error:
        reason = f"{type(error).__name__}: {error}"

    say(f"rolling {single} back")
    back = client.rollback(single)
    return (
        Step(f"swap of {single}", one),
        Step(f"swap of {', '.join(others)} and the gate", several),
        Step("swap of a bad file", refused, reason),
        Step(f"rollback of {single}", back),
    )
