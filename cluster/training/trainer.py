"""Trains the experts and the gate of a layer in phases, here or on a cluster, and goes on where it was stopped.

Shapes: T rows, E experts, B rows of a step, K choices per row.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import ConfigError, DataLoss, FailedPrecondition
from ...experts.training.optimizer_state import restore, state_of
from ...experts.weights.files import tensor_digest, tensors_from_bytes, tensors_of, tensors_to_bytes
from ...router.gates import Gate
from ...router.gates.linear import LinearGate
from ...router.mixture.balance import load, load_balance_loss
from ..client.client import Client
from ..client.methods import BlockingMethods
from ..machine.durable_files import write_private_bytes
from ..rpc.swaps import SwapOutcome
from ..torch_client.remote_moe import RemoteMoE
from .data import TrainingData
from .mixture import ClusterMixture, LocalMixture, Mixture
from .phases import SUBSETS, Pairs, Phase, epoch_batches, should_stop, steps_of
from .record import EpochResult, Log, Progress, Tell, TrainingReport, results_of, shares_of
from .start import Loss, aim_gate, check_local, fitting, loss_of, subsets_of
from .written import write_layer

CHECKPOINT, SESSION = "checkpoint.safetensors", "session"
PHASES = (Phase(kind="experts"), Phase(kind="gate"), Phase(kind="joint", lr=3e-4))
EVALUATED_AT_ONCE = 4096


class Trainer:
    """Trains sub-models on their subsets of the rows, then their gate, then all together.

    `layer` is a `Layer`, whose experts are built and trained in this process, or with a `connection` (a `Client` or an
    attached router) the name of a layer of a running cluster, on whose candidates it works; `gate` is then its gate.
    `loss` is "cross_entropy", "mse", or a function of answers and targets; by default what the targets suggest.

    `subsets` says which rows each expert is trained on: "cluster" (a region of the rows each), "label", "random" or
    "all"; `nearest` is the number of experts of a row, and each also sees `share` of all other rows. `balance` is the
    factor of the load-balance loss, `explore` that of the loss of the mixture of all experts, which teaches a gate what
    it would not choose, and `dropout` the share of the input that is zeroed. `optimizer` is one of torch.optim, with
    `arguments` of its own. `replicas` says who computes in a cluster: the "first" of each expert, or "all".

    With a `folder` the training goes on there after Ctrl-C or SIGKILL, from its last checkpoint, which is written every
    `save_every` seconds and at the end of each phase; `train.csv` is there too, and with `tensorboard` its logs.

    Example:
        trainer = Trainer(layer, TrainingData.of(x, y), folder="out")
        print(trainer.fit().table())
        trainer.write("out")             # files, and a mesh.yaml for `expertmesh serve`
    """

    def __init__(
        self,
        layer: Any,
        data: TrainingData,
        *,
        connection: BlockingMethods | None = None,
        gate: Gate | None = None,
        phases: Sequence[Phase] = PHASES,
        loss: str | Loss | None = None,
        batch: int = 128,
        subsets: str = "cluster",
        nearest: int = 1,
        share: float = 0.2,
        balance: float = 0.01,
        explore: float = 0.0,
        dropout: float = 0.0,
        optimizer: str = "torch.optim:AdamW",
        arguments: Mapping[str, Any] | None = None,
        replicas: str = "first",
        seed: int = 0,
        folder: str | Path | None = None,
        save_every: float = 30.0,
        tensorboard: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for what does not fit together."""
        self.data = data
        self.layer = layer
        self.phases = tuple(phases)
        named, self._figure = loss_of(loss, data)
        self._loss = fitting(named)
        self._batch, self._balance, self._explore, self._dropout = batch, balance, explore, dropout
        self._seed, self._save_every, self._clock = seed, save_every, clock
        self._folder = None if folder is None else Path(folder)
        self._tensorboard = tensorboard
        self._connection = connection
        if subsets not in SUBSETS:
            raise ConfigError(f"subsets must be one of {', '.join(SUBSETS)}, not {subsets!r}")
        if batch < 1 or not 0 <= dropout < 1:
            raise ConfigError(f"batch must be 1 or more, and dropout a share below 1, not {batch} and {dropout}")
        if not self.phases:
            raise ConfigError("there must be at least one phase")
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        own = layer.gate if gate is None and connection is None else gate
        if not isinstance(own, Gate):
            raise ConfigError("name the gate of the layer: gate=gates.TopK(...)")
        self.gate = own
        self._at, self._caller = (0, 0), b""
        self._history: tuple[EpochResult, ...] = ()
        arguments = dict(arguments or {})
        self.seen_TE = subsets_of(subsets, data, own.num_experts, nearest, share, seed)
        if connection is None:
            check_local(layer)
        settings = (self.phases, batch, subsets, nearest, share, balance, explore, dropout, optimizer, seed)
        made_of = (settings, sorted(arguments.items()), loss if isinstance(loss, str) else "", own.name, own.config())
        experts = "" if connection is not None else repr(sorted(layer.experts.items()))
        rows = tensor_digest({"x": data.x, "y": data.y, "held_x": data.held_x, "held_y": data.held_y})
        self._settings = hashlib.sha256(repr((made_of, experts, rows)).encode()).hexdigest()
        self.mixture: Mixture
        if connection is None:
            self.mixture = self._local(optimizer, arguments)
        else:
            self.mixture = self._remote(connection, optimizer, arguments, replicas)
        count = len(self.mixture.names)
        if self.gate.num_experts != count:
            if connection is not None:
                self.session.abort()
            raise ConfigError(f"the gate chooses among {self.gate.num_experts} experts, but the layer has {count}")
        parameters = [parameter for parameter in self.gate.parameters() if parameter.is_floating_point()]
        self._gate_optimizer: torch.optim.Optimizer | None = None
        if parameters:
            self._gate_optimizer = torch.optim.AdamW(parameters, weight_decay=arguments.get("weight_decay", 0.01))
        if self._caller:
            self._restore(self._caller)
        elif subsets == "cluster" and isinstance(self.gate, LinearGate):
            aim_gate(self.gate, data.x, seed)

    def fit(self, tell: Tell = lambda progress: None) -> TrainingReport:
        """Train what is left of the phases, and report; `tell` is called with the progress.

        An interrupt leaves the last checkpoint, from which another trainer with the same folder goes on. Raises
        FailedPrecondition where the loss is not finite; the last checkpoint is then as it was.
        """
        began = self._clock()
        log = Log(self._folder, tensorboard=self._tensorboard, after=self._history)
        before = self._history[0].held_out if self._history else self.evaluate()
        results: list[EpochResult] = list(self._history)
        try:
            first = self._at[0]
            for number, phase in enumerate(self.phases[first:], start=first):
                epoch = self._at[1] if number == first else 0
                for result in self._epochs(number, phase, epoch, results, tell):
                    results.append(result)
                    log.add(result)
                    self._history = tuple(results)
                self._at = (number + 1, 0)
                self.save()
        finally:
            log.close()
        return TrainingReport(self._figure, before, self.evaluate(), tuple(results), self._clock() - began)

    def _epochs(self, number: int, phase: Phase, first: int, before: Sequence[EpochResult], tell: Tell) -> Any:
        """The epochs of a phase, one after the other."""
        each = steps_of(phase.kind, self.seen_TE, self._batch)
        held = [result.held_out for result in before if result.phase == self._name(number)]
        saved = began = self._clock()
        done = 0
        for epoch in range(first, phase.epochs):
            batches = epoch_batches(phase.kind, self.seen_TE, self._batch, (self._seed, number, epoch))
            total, epoch_began = 0.0, self._clock()
            self._load_E = torch.zeros(self.gate.num_experts, dtype=torch.int64)
            for at, pairs in enumerate(batches):
                step = epoch * each + at
                rate = phase.rate(step, phase.epochs * each)
                loss = self._step(phase.kind, pairs, rate, (self._seed, number, step))
                total, done = total + loss, done + len(pairs)
                spent = self._clock() - began
                left = spent / (step + 1 - first * each) * (phase.epochs * each - step - 1)
                tell(
                    Progress(
                        self._name(number), epoch + 1, phase.epochs, step + 1, phase.epochs * each, total / (at + 1),
                        done / max(spent, 1e-9), left,
                    )
                )  # fmt: skip
            figure = self.evaluate()
            held.append(figure)
            speed = sum(map(len, batches)) / max(self._clock() - epoch_began, 1e-9)
            yield EpochResult(
                self._name(number),
                epoch + 1,
                (epoch + 1) * each,
                total / each,
                figure,
                rate,
                speed,
                shares_of(self._load_E),
            )
            if should_stop(held, phase.patience, higher_is_better=self._figure == "accuracy"):
                return
            self._at = (number, epoch + 1)
            if self._clock() - saved > self._save_every:
                self.save()
                saved = self._clock()

    def _name(self, number: int) -> str:
        kind = self.phases[number].kind
        return kind if sum(phase.kind == kind for phase in self.phases) == 1 else f"{kind} {number + 1}"

    def _step(self, kind: str, pairs: Pairs, rate: float, draw: tuple[int, ...]) -> float:
        x, y = self.data.x[pairs.rows_N], self.data.y[pairs.rows_N]
        whole = x
        if self._dropout:
            keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(hash(draw) % 2**62)) >= self._dropout
            x = x * keep / (1 - self._dropout)
        self.mixture.train(kind != "gate")
        if self._gate_optimizer is not None:
            self._gate_optimizer.zero_grad()
        if pairs.experts_N is not None:
            answers = self.mixture(x, pairs.experts_N[:, None], torch.ones(len(x), 1))
            sizes = [count for count in torch.bincount(pairs.experts_N).tolist() if count]
            parts = zip(torch.split(answers, sizes), torch.split(y, sizes), strict=True)
            losses = torch.stack([self._loss(own, wanted) for own, wanted in parts])  # each of its own rows alone
            torch.autograd.backward(losses.sum())
            loss = losses.mean()
        else:
            loss = self._mixed(x, whole if kind == "gate" else x, y)
            torch.autograd.backward(loss)
        if not math.isfinite(float(loss.detach())):
            self.mixture.forget()
            raise FailedPrecondition(
                f"the loss is {float(loss.detach())}: try a lower lr, or look at the rows; the last "
                "checkpoint is as it was"
            )
        if kind == "gate":
            self.mixture.forget()
        else:
            self.mixture.step(rate)
        if kind != "experts" and self._gate_optimizer is not None:
            for group in self._gate_optimizer.param_groups:
                group["lr"] = rate
            self._gate_optimizer.step()
        return float(loss.detach())

    def _mixed(self, seen_by_gate: Tensor, x: Tensor, y: Tensor) -> Tensor:
        scores_TE = self.gate.scores(seen_by_gate)
        routing = self.gate.select(scores_TE)
        self._load_E += load(routing, self.gate.num_experts)
        loss = self._loss(self.mixture(x, routing.indices_TK, routing.weights_TK), y)
        if self._explore:
            everyone = torch.arange(self.gate.num_experts).expand(len(x), -1)
            loss = loss + self._explore * self._loss(self.mixture(x, everyone, scores_TE.softmax(dim=1)), y)
        if self._balance:
            loss = loss + self._balance * load_balance_loss(scores_TE.softmax(dim=1), routing)
        return loss

    @torch.no_grad()
    def evaluate(self) -> float:
        """The figure on the held-out rows: the accuracy of classes, else the mean loss."""
        self.mixture.train(False)
        self.gate.eval()
        answers = []
        for x in torch.split(self.data.held_x, EVALUATED_AT_ONCE):
            routing = self.gate(x)
            answers.append(self.mixture(x, routing.indices_TK, routing.weights_TK))
        self.gate.train()
        y = torch.cat(answers)
        if self._figure == "accuracy":
            return float((y.argmax(dim=1) == self.data.held_y).float().mean())
        return float(self._loss(y, self.data.held_y))

    def save(self) -> None:
        """Write a checkpoint: where the training is, the gate and its optimizer, and all experts."""
        if self._folder is None and self._connection is None:
            return
        tensors = {f"gate.{name}": tensor for name, tensor in tensors_of(self.gate).items()}
        plain: dict[str, str] = {
            "settings": self._settings,
            "at": json.dumps(self._at),
            "history": json.dumps([asdict(result) for result in self._history]),
        }
        if self._gate_optimizer is not None:
            moments, document = state_of(self._gate_optimizer)
            tensors |= moments
            plain["optimizer"] = json.dumps(document)
        self.mixture.save(tensors_to_bytes(tensors, plain))

    def _restore(self, saved: bytes) -> None:
        tensors, metadata = tensors_from_bytes(saved)
        if metadata.get("settings") != self._settings:
            raise ConfigError(
                "the checkpoint in the folder is of a training with other settings, rows or experts: take another "
                "folder, or remove it to begin anew"
            )
        try:
            self.gate.load_state_dict({n.removeprefix("gate."): t for n, t in tensors.items() if n.startswith("gate.")})
            if self._gate_optimizer is not None:
                restore(self._gate_optimizer, tensors, json.loads(metadata["optimizer"]))
            number, epoch = json.loads(metadata["at"])
            self._history = results_of(metadata["history"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise DataLoss(f"the checkpoint is of another gate, or damaged: {error}") from None
        self._at = (number, epoch)

    def publish(self, client: Client | None = None, **options: Any) -> SwapOutcome:
        """Swap experts and gate in for what serves, in one epoch: of the session's cluster, or of that of `client`.

        `options` are those of `TrainingSession.publish`, or of `Client.swap`. Raises their errors.
        """
        if self._connection is not None:
            outcome = self.session.publish(gate=self.gate, **options)
            self.session.abort()
            self._session_file(remove=True)
            return outcome
        if client is None:
            raise ConfigError("name the cluster: publish(client)")
        if self._folder is None:
            raise ConfigError("give the trainer a folder for the files that are published")
        files = self.write(self._folder)
        return client.swap(files, allow_norm=True, **options)

    def write(self, folder: str | Path) -> dict[str, Path]:
        """Write the experts and the gate as safetensors, and a mesh.yaml that `expertmesh serve` takes; files by id.

        Raises ConfigError for experts of a cluster, which are published instead.
        """
        if not isinstance(self.mixture, LocalMixture):
            raise ConfigError("the experts are in a cluster: publish() them")
        modules = dict(zip(self.mixture.names, self.mixture.modules, strict=True))
        return write_layer(Path(folder), self.layer, modules, self.gate)

    def _local(self, optimizer: str, arguments: Mapping[str, Any]) -> LocalMixture:
        path = None if self._folder is None else self._folder / CHECKPOINT

        def write(content: bytes) -> None:
            if path is not None:
                write_private_bytes(path, content)

        mixture = LocalMixture.of(self.layer.name, self.layer.experts, optimizer, arguments, write)
        if path is not None and path.is_file():
            self._caller = mixture.restore(path.read_bytes())
        return mixture

    def _remote(
        self, connection: BlockingMethods, optimizer: str, arguments: Mapping[str, Any], replicas: str
    ) -> ClusterMixture:
        path = self._session_file()
        known = path.read_text(encoding="utf-8").strip() if path is not None and path.is_file() else None
        if known:
            self.session = connection.train(self.layer, resume=known, durable_every=None, seed=self._seed)
            self._caller = self.session.saved or b""
        else:
            self.session = connection.train(
                self.layer,
                optimizer=optimizer,
                durable_every=None,
                replicas=replicas,
                seed=self._seed,
                **arguments,
            )
            if path is not None:
                path.write_text(self.session.id, encoding="utf-8")
        return ClusterMixture(RemoteMoE(connection, self.layer, session=self.session), self.session)

    def _session_file(self, *, remove: bool = False) -> Path | None:
        path = None if self._folder is None else self._folder / SESSION
        if path is not None and remove:
            path.unlink(missing_ok=True)
        return path
