"""The trainer: its phases learn, it goes on where it was stopped bit for bit, and what it writes is served."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import layer_of, trained_cluster
from torch import Tensor

from expertmesh import Client, Cluster, ConfigError, Expert, Layer, TensorSpec, gates
from expertmesh.cluster.training.data import TrainingData, read_data
from expertmesh.cluster.training.phases import Phase, epoch_batches, should_stop, steps_of
from expertmesh.cluster.training.record import Progress
from expertmesh.cluster.training.trainer import CHECKPOINT, Trainer
from expertmesh.experts.errors import FailedPrecondition, MissingExtra
from expertmesh.experts.weights.files import save_tensors

WIDTH, CLASSES = 6, 3
SHORT = (
    Phase(kind="experts", epochs=3, lr=2e-2),
    Phase(kind="gate", epochs=2, lr=1e-2),
    Phase(kind="joint", epochs=2, lr=1e-2),
)


def classes(count: int = 240) -> TrainingData:
    """Rows around two centres for each of three classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2 * CLASSES, WIDTH, generator=generator) * 3
    at = torch.randint(2 * CLASSES, (count,), generator=generator)
    x = centres[at] + torch.randn(count, WIDTH, generator=generator)
    return TrainingData.of(x, at % CLASSES)


def layer(gate: gates.Gate | None = None) -> Layer:
    rows, out = TensorSpec((WIDTH,), "float32"), TensorSpec((CLASSES,), "float32")
    factory, options = "expertmesh.experts.modules:FeedForward", {"out_features": CLASSES}
    experts = {f"e{n}": Expert(factory, args=(WIDTH, 8), kwargs=options, input=rows, output=out) for n in range(3)}
    return Layer("l", gate or gates.TopK(WIDTH, 3, k=2, bias=True), experts, input=rows)


def state(trainer: Trainer) -> dict[str, Tensor]:
    experts: Any = trainer.mixture
    return {**experts.experts.state_dict(), **{f"gate.{n}": t for n, t in trainer.gate.state_dict().items()}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_sub_models_then_gate_then_all_learn(tmp_path: Path) -> None:
    told: list[Progress] = []
    trainer = Trainer(layer(), classes(), phases=SHORT, batch=16, folder=tmp_path)
    report = trainer.fit(told.append)
    assert [result.phase for result in report.epochs] == ["experts"] * 3 + ["gate"] * 2 + ["joint"] * 2
    assert report.epochs[2].loss < report.epochs[0].loss
    assert report.figure == "accuracy"
    assert report.after > 0.9
    assert {"experts", "gate", "joint"} <= set(report.table().split())
    assert (told[-1].step, told[-1].epoch) == (told[-1].steps, told[-1].epochs)
    assert "joint: epoch 2/2" in str(told[-1])
    with (tmp_path / "train.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in lines] == [result.loss for result in report.epochs]
    assert report.as_dict()["after"] == report.after


class Stopped(BaseException):
    """As Ctrl-C, at any step."""


@pytest.mark.parametrize("at", [1, 5, 14, 20])
def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    whole = Trainer(layer(), classes(), phases=SHORT, batch=32, dropout=0.2)
    report = whole.fit()

    def trainer() -> Trainer:
        options: dict[str, Any] = {"phases": SHORT, "batch": 32, "dropout": 0.2, "save_every": 0.0}
        return Trainer(layer(), classes(), folder=tmp_path, **options)

    count = [0]

    def stop(progress: Progress) -> None:
        count[0] += 1
        if count[0] == at:
            raise Stopped

    with pytest.raises(Stopped):
        trainer().fit(stop)
    again = trainer()
    resumed = again.fit()
    assert same(state(again), state(whole))
    assert [(r.phase, r.loss, r.held_out) for r in resumed.epochs] == [
        (r.phase, r.loss, r.held_out) for r in report.epochs
    ]
    assert trainer().fit().after == report.after  # nothing is left to do


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("written")
    trainer = Trainer(layer(), classes(), phases=SHORT[:2], batch=32)
    trainer.fit()
    trainer.write(folder)
    return folder, trainer


def test_what_is_written_is_served(written: tuple[Path, Trainer]) -> None:
    folder, trainer = written
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": "written", "state_dir": str(folder / "state")}
    with Cluster.from_config(folder / "mesh.yaml", **options) as cluster, Client(cluster.endpoint) as client:
        x = trainer.data.held_x
        routing = trainer.gate(x)
        with torch.no_grad():
            wanted = trainer.mixture(x, routing.indices_TK, routing.weights_TK)
        assert torch.allclose(torch.as_tensor(client.forward("l", x)), wanted, atol=1e-5)


def test_what_was_trained_here_is_published_elsewhere(tmp_path: Path) -> None:
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": "published", "state_dir": tmp_path / "state"}
    with Cluster.start([layer()], **options) as cluster, Client(cluster.endpoint) as client:
        trainer = Trainer(layer(), classes(), phases=SHORT[:1], batch=32, folder=tmp_path / "out")
        trainer.fit()
        outcome = trainer.publish(client)
        assert set(outcome.after) == {"l/e0", "l/e1", "l/e2", "l/gate"}
        answers = torch.as_tensor(client.forward("l", trainer.data.held_x))
        assert float((answers.argmax(dim=1) == trainer.data.held_y).float().mean()) == trainer.evaluate()


def test_a_cluster_is_trained_stopped_resumed_and_published(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, WIDTH, generator=generator)
    data = TrainingData.of(x, x.sin())
    declared = layer_of(tmp_path, gates.TopK(WIDTH, 3, k=2))

    def trainer(running: Any, folder: str) -> Trainer:
        torch.manual_seed(3)
        gate, short = gates.TopK(WIDTH, 3, k=2), tuple(Phase(kind=kind, epochs=2) for kind in ("experts", "joint"))
        options: dict[str, Any] = {"gate": gate, "phases": short, "batch": 16, "save_every": 0.0}
        return Trainer("l", data, connection=running.client, folder=tmp_path / folder, **options)

    with trained_cluster(tmp_path, declared) as running:
        whole = trainer(running, "whole")
        report = whole.fit()
        assert report.figure == "loss"
        assert report.after < report.before
        whole.session.abort()
        stopped = trainer(running, "stopped")
        count = [0]

        def stop(progress: Progress) -> None:
            count[0] += 1
            if count[0] == 8:
                raise Stopped

        with pytest.raises(Stopped):
            stopped.fit(stop)
    with trained_cluster(tmp_path, declared) as running:  # everything was lost but what is durable
        again = trainer(running, "stopped")
        resumed = again.fit()
        assert [(r.loss, r.held_out) for r in resumed.epochs] == [(r.loss, r.held_out) for r in report.epochs]
        epoch = running.client.status()["epoch"]
        assert again.publish().epoch == epoch + 1
        served = torch.as_tensor(running.client.forward("l", data.held_x))
        assert float((served - data.held_y).square().mean()) == pytest.approx(report.after, rel=1e-4)
        assert running.client.training_sessions() == []


def test_a_checkpoint_is_of_its_rows_and_its_gate(tmp_path: Path) -> None:
    Trainer(layer(), classes(), phases=SHORT[:1], batch=32, folder=tmp_path).fit()
    for data, gate in ((classes(200), None), (classes(), gates.TopK(WIDTH, 3, k=1, bias=True))):
        with pytest.raises(ConfigError, match="other settings, rows or experts"):
            Trainer(layer(gate), data, phases=SHORT[:1], batch=32, folder=tmp_path)
    few = TrainingData(*(torch.tensor(part) for part in ([[0.0] * WIDTH] * 4, [0, 1, 2, 7], [[0.0] * WIDTH], [0])))
    with pytest.raises(ConfigError, match="an output for each class"):
        Trainer(layer(), few, phases=SHORT[:1], subsets="all").fit()


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data = classes()

    def stop(progress: Progress) -> None:
        if progress.phase == "gate":
            raise Stopped

    with pytest.raises(Stopped):
        Trainer(layer(), data, phases=SHORT, batch=32, folder=tmp_path).fit(stop)
    before = (tmp_path / CHECKPOINT).read_bytes()
    bad = Trainer(layer(), data, phases=SHORT, batch=32, folder=tmp_path, loss=lambda y, t: y.sum() * float("nan"))
    with pytest.raises(FailedPrecondition, match="the loss is nan"):
        bad.fit()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    with pytest.raises(ConfigError, match="a training with other settings"):
        Trainer(layer(), data, phases=SHORT[:1], batch=32, folder=tmp_path)


def test_early_stop_and_what_an_epoch_is() -> None:
    assert not should_stop([0.5, 0.4], None, higher_is_better=True)
    assert should_stop([0.5, 0.4, 0.5], 2, higher_is_better=True)
    assert not should_stop([0.5, 0.4, 0.6], 2, higher_is_better=True)
    assert should_stop([0.5, 0.6, 0.5], 2, higher_is_better=False)
    seen_TE = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    for batch in (1, 2, 5):
        batches = epoch_batches("experts", seen_TE, batch, (0, 0, 0))
        assert len(batches) == steps_of("experts", seen_TE, batch)
        found = [(e, row) for b in batches for row, e in zip(b.rows_N.tolist(), b.experts_N.tolist(), strict=True)]  # type: ignore[union-attr]
        assert sorted(found) == [(0, 0), (0, 1), (1, 1), (1, 2)]
        assert all(b.experts_N.tolist() == sorted(b.experts_N.tolist()) for b in batches)  # type: ignore[union-attr]
    rows = [row for b in epoch_batches("joint", seen_TE, 2, (0,)) for row in b.rows_N.tolist()]
    assert (sorted(rows), steps_of("joint", seen_TE, 2)) == ([0, 1, 2], 2)
    patient = Trainer(layer(), classes(), phases=(Phase(kind="gate", epochs=50, lr=0.0, patience=2),))
    assert len(patient.fit().epochs) == 3


def test_bad_input_is_told(tmp_path: Path) -> None:
    data = classes()
    for wrong, message in (
        ({"subsets": "rows"}, "subsets must be one of"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"phases": ()}, "at least one phase"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"optimizer": "torch.optim:Adm"}, "did you mean"),
        ({"gate": gates.TopK(WIDTH, 4)}, "chooses among 4 experts, but the layer has 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(layer(), data, **wrong)  # type: ignore[arg-type]
    for wrong, message in (({"kind": "all"}, "a phase is one of"), ({"kind": "gate", "epochs": 0}, "epochs")):
        with pytest.raises(ConfigError, match=message):
            Phase(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="those of row 3 are not"):
        TrainingData.of(torch.tensor([[0.0], [0.0], [0.0], [float("nan")]]), torch.zeros(4), held_out=0.01, seed=5)
    with pytest.raises(ConfigError, match="has its own combine"):
        Trainer(replace(layer(), combine="residual"), data)
    with pytest.raises(ConfigError, match="is not a torch module"):
        Trainer(Layer("l", gates.Fixed([1.0]), {"s": Expert("torch:sin")}), data)
    trainer = Trainer(layer(), data, phases=SHORT[:1], folder=tmp_path, tensorboard=True)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="pip install tensorboard"):
            trainer.fit()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv:1: a header"),
        ("a,b\n", "no rows below its header"),
        ("a,b\n1,x\n2\n", "t.csv:3: 1 fields, but the header has 2"),
        ("a,b\n1,x\nz,y\n", "t.csv:3: a is 'z', not a number"),
        ("a,b\n1,x\nnan,y\n", "t.csv:3: a is 'nan', not a finite number"),
        ("a,b\n1,x\n2, \n", "t.csv:3: the label 'b' is missing"),
        ("a,b\n1,x\n2,x\n", "all rows have the label 'x'"),
    ],
)
def test_a_broken_table_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_data(path)


def test_tables_and_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("kind,a,b\nred,1,2\nblue,3,4\nred,5,6\nblue,7,8\n")
    data = read_data(path, label="kind", held_out=0.5)
    assert (data.names, data.x.shape, data.is_classified) == (("blue", "red"), (2, 2), True)
    with pytest.raises(ConfigError, match="no column 'color'; the columns are kind, a, b"):
        read_data(path, label="color")
    path.write_text("a,n\n1,10\n2,2\n3, 1 \n4,0\n")
    data = read_data(path, held_out=0.25)
    assert sorted([*data.y.tolist(), *data.held_y.tolist()]) == [0, 1, 2, 10]
    path.write_text("a,y\n1,0.5\n2,1.5\n3,2\n")
    assert not read_data(path).is_classified
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_data(path)
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"x": torch.ones(4, 2), "y": torch.tensor([0, 1, 0, 1])})
    assert len(read_data(file).x) == 3
    save_tensors(file, {"x": torch.ones(4, 2)})
    with pytest.raises(ConfigError, match="no tensor 'y'"):
        read_data(file)
