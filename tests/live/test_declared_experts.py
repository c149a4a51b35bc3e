"""Declarations of experts on a whole cluster: seeds, code, files that a factory reads, and what nobody could try."""

from __future__ import annotations

import sys
import types
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.cluster.control import candidate_records
from expertmesh.experts.errors import ConfigError, FailedPrecondition
from expertmesh.experts.spec import TensorSpec
from expertmesh.experts.weights.files import save_tensors

pytestmark = pytest.mark.usefixtures("own_home")
X = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
LINEAR = Expert("torch.nn:Linear", args=(3, 3))


@contextmanager
def serving(*layers: Layer, **options: Any) -> Iterator[tuple[Cluster, Client]]:
    made: dict[str, Any] = {"transport": "local", "port": 0, "metrics_port": None, "name": "declared"}
    with Cluster.start(layers, **(made | options)) as cluster, Client(cluster.endpoint) as client:
        yield cluster, client


def lone(expert: Expert, **options: Any) -> Layer:
    return Layer("l", gates.Fixed([1.0]), {"e": expert}, **options)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module with this text, importable until the test is over; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"written_{uuid.uuid4().hex}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


def test_experts_of_one_declaration_are_different_and_the_same_after_a_restart(tmp_path: Path) -> None:
    layers = [Layer(name, gates.Fixed([1.0, 1.0], k=2), {"a": LINEAR, "b": LINEAR}) for name in ("l", "m")]

    def answers() -> list[bytes]:
        with serving(*layers, state_dir=tmp_path / "state") as (cluster, client):
            assert cluster.status()["epoch"] == 1
            asked = [(layer.name, expert) for layer in layers for expert in ("a", "b")]
            return [client.call(layer, X, allow=[expert]).output.tobytes() for layer, expert in asked]

    first = answers()
    assert len(set(first)) == 4
    assert answers() == first


def test_versions_that_were_seeded_without_their_id_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_recipe(expert: Expert) -> dict[str, Any]:
        kept = candidate_origin(expert)
        del kept["recipe"]
        return kept

    layer, candidate_origin = (
        Layer("l", gates.Fixed([1.0, 1.0]), {"a": LINEAR, "b": LINEAR}),
        candidate_records.origin_of,
    )
    with monkeypatch.context() as former:
        former.setattr(candidate_records, "origin_of", without_recipe)
        with serving(layer, state_dir=tmp_path / "state") as (_, client):
            before = [client.call("l", X, allow=[name]) for name in ("a", "b")]
    assert before[0].output.tobytes() == before[1].output.tobytes()
    with serving(layer, state_dir=tmp_path / "state") as (cluster, client):
        after = [client.call("l", X, allow=[name]) for name in ("a", "b")]
        assert [reply.versions for reply in after] == [reply.versions for reply in before]
        assert [reply.output.tobytes() for reply in after] == [reply.output.tobytes() for reply in before]
        cluster.replace("l/a", LINEAR)
        assert client.call("l", X, allow=["a"]).output.tobytes() != before[0].output.tobytes()


def test_a_replacement_that_nobody_could_try_is_refused_unless_it_is_asked_for() -> None:
    with serving(lone(Expert("torch:sin"))) as (cluster, client):
        broken = Expert.from_function(lambda rows: rows / 0 if rows.ndim > 9 else 1 / 0)
        with pytest.raises(
            FailedPrecondition,
            match=r"^l/e: whether the new version answers is not known .not run, because no rows were .*allow_unver",
        ):
            cluster.replace("l/e", broken)
        version = cluster.replace("l/e", Expert("torch:cos"), allow_unverified=True)
        reply = client.call("l", X)
        assert reply.versions["l/e"] == version
        assert np.allclose(reply.output, np.cos(X))


def test_a_replacement_is_tried_with_rows_like_those_that_were_served() -> None:
    layer = Layer("l", gates.Fixed([1.0, 0.5], k=1), {"a": Expert("torch:sin"), "b": Expert("torch:sin", replicas=2)})
    with serving(layer) as (cluster, client):
        client.call("l", X)  # to one expert, and so to one replica of the other none
        before = client.call("l", X).versions
        narrow = Expert.from_function(lambda rows: rows[:, :1])
        for id, expert, said in (
            ("l/a", Expert.from_function(lambda rows: 1 / 0), "raised ZeroDivisionError on probe rows"),
            ("l/a", narrow, r"answers probe rows with \[1\] float32, but the version it replaces has \[3\]"),
        ):
            with pytest.raises(FailedPrecondition, match=said):
                cluster.replace(id, expert)
            assert client.call("l", X).versions == before
        client.call("l", X, allow=["b"])  # one of its two replicas has served: it speaks for both
        cluster.replace("l/b", Expert("torch:tanh"))
        assert np.allclose(client.forward("l", X, allow=["b"]), np.tanh(X) * 0.5, atol=1e-6)


def test_rows_that_neither_version_answers_prove_nothing(tmp_path: Path) -> None:
    def only_large(by: float) -> Expert:
        return Expert.from_function(lambda rows: rows * by if bool((rows > 99).all()) else 1 / 0)

    with serving(lone(only_large(2.0))) as (cluster, client):
        assert client.forward("l", X + 100)[0, 0] == 202
        with pytest.raises(
            FailedPrecondition, match=r"does not answer probe rows like those .* neither does the new one"
        ):
            cluster.replace("l/e", only_large(3.0))
        cluster.replace("l/e", only_large(3.0), allow_unverified=True)
        assert client.forward("l", X + 100)[0, 0] == 303


def test_an_outcome_says_why_its_drift_was_not_measured(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kwargs": {"width": 3}}
    with serving(lone(Expert("helpers.samples:Affine", **options)), allowed_factories=["torch:sin"]) as (_, client):
        save_tensors(tmp_path / "w", {"bias": torch.ones(3)})
        outcome = client.swap({"l/e": tmp_path / "w"})  # of the same code: its tensors are verified
        assert (outcome.committed, outcome.drift) == (True, {"l/e": None})
        assert outcome.unmeasured == {"l/e": "not run, because no rows were declared or served"}
        factory = {"l/e": {"factory": "torch:sin"}}
        with pytest.raises(FailedPrecondition, match="allow_unverified"):
            client.swap(factory)
        with pytest.raises(FailedPrecondition, match="allow_unverified"):
            client.swap(factory, dry_run=True)
        assert client.swap(factory, allow_unverified=True).unmeasured == outcome.unmeasured
        client.forward("l", X)
        again = client.rollback("l/e")
        assert again.drift["l/e"] is not None
        assert again.unmeasured == {}


class Held:
    """An expert that keeps what it computes with in an object of the standard library."""

    def __init__(self, by: float) -> None:
        self.settings = types.SimpleNamespace(by=by)

    def __call__(self, rows: Any) -> Any:
        return rows * self.settings.by


def test_a_replacement_whose_difference_is_hidden_in_an_object_takes_effect() -> None:
    with serving(lone(Expert(live=Held(2.0)))) as (cluster, client):
        assert client.forward("l", X)[0, 0] == 2
        cluster.replace("l/e", Expert(live=Held(3.0)))
        assert client.forward("l", X)[0, 0] == 3


def test_a_replacement_that_is_what_serves_changes_nothing_and_says_so() -> None:
    with serving(lone(Expert(live=Held(2.0)))) as (cluster, client):
        client.forward("l", X)
        before = cluster.status()
        with pytest.warns(UserWarning, match=r"^l/e was replaced by what it already is: v1-.* nothing has changed"):
            assert cluster.replace("l/e", Expert(live=Held(2.0))) == before["versions"]["l/e"]
        assert cluster.status()["epoch"] == before["epoch"]
        assert len(client.history("l/e")) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cluster.replace("l/e", Expert(live=Held(4.0)))
        assert client.forward("l", X)[0, 0] == 4


def test_a_failed_replacement_leaves_weights_that_were_swapped_in(tmp_path: Path) -> None:
    layer = lone(Expert("helpers.samples:Affine", kwargs={"width": 3}), input=TensorSpec((3,)))
    save_tensors(tmp_path / "w", {"bias": torch.ones(3)})
    with serving(layer) as (cluster, client):
        version = client.swap({"l/e": tmp_path / "w"}).after["l/e"]
        with pytest.raises(ConfigError):
            cluster.replace("l/e", Expert("helpers.samples:FailsToStart"))
        reply = client.call("l", X)
        assert (reply.versions["l/e"], reply.output[0, 0]) == (version, 2)


def test_a_file_that_a_factory_reads_is_read_again(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("import numpy as np\ndef load(path):\n    w = np.load(path)\n    return lambda x: x * w\n")
    path, state = tmp_path / "w.npy", tmp_path / "state"
    expert = Expert(f"{name}:load", kwargs={"path": str(path)}, framework="numpy")
    np.save(path, np.float32([2]))
    with serving(lone(expert), state_dir=state) as (cluster, client):
        assert client.forward("l", X)[0, 0] == 2
        np.save(path, np.float32([3]))
        version = cluster.replace("l/e", expert)
        assert client.forward("l", X)[0, 0] == 3
    with serving(lone(expert), state_dir=state) as (cluster, client):
        assert (cluster.status()["versions"]["l/e"], client.forward("l", X)[0, 0]) == (version, 3)
    np.save(path, np.float32([4]))  # while nobody looks: the recorded version cannot be made again
    with serving(lone(expert), state_dir=state, redeclare=["l/e"]) as (_, client):
        assert client.forward("l", X)[0, 0] == 4


def test_redeclaring_goes_back_to_the_declared_weights(tmp_path: Path) -> None:
    layer = lone(Expert("helpers.samples:Affine", kwargs={"width": 3}), input=TensorSpec((3,)))
    save_tensors(tmp_path / "w", {"bias": torch.ones(3)})
    options: dict[str, Any] = {"state_dir": tmp_path / "state"}
    with serving(layer, **options) as (_, client):
        client.swap({"l/e": tmp_path / "w"})
    for redeclare, bias in (([], 1), (["l/e"], 0), (["l/e"], 0)):
        with serving(layer, redeclare=redeclare, **options) as (cluster, client):
            assert np.array_equal(client.forward("l", X), X + bias)
            assert cluster.status()["epoch"] == 3 - bias


def test_code_whose_file_was_edited_is_refused_and_not_reported_as_new(module: Callable[[str], str]) -> None:
    text = "def helper(x):\n    return x * {}\ndef double(x):\n    return helper(x)\n"
    expert = Expert(f"{module(text.format(2))}:double")
    with serving(lone(expert), allowed_factories=[expert.factory]) as (cluster, client):
        assert client.forward("l", X)[0, 0] == 2
        module(text.format(3))
        said = "the file of module 'written_.*' has changed since this process imported it.*another name.*restart"
        with pytest.raises(FailedPrecondition, match=said):
            cluster.replace("l/e", expert)
        with pytest.raises(FailedPrecondition, match=said):
            client.swap({"l/e": {"factory": expert.factory}})
        assert client.forward("l", X)[0, 0] == 2
        module(text.format(2))
        with pytest.warns(UserWarning, match="nothing has changed"):
            cluster.replace("l/e", expert)


def test_weights_of_edited_code_may_still_be_swapped(module: Callable[[str], str], tmp_path: Path) -> None:
    text = "import torch\nclass Made(torch.nn.Linear):\n    def __init__(self): super().__init__(3, 3)\n"
    name = module(text)
    save_tensors(tmp_path / "w", {"weight": torch.eye(3), "bias": torch.ones(3)})
    with serving(lone(Expert(f"{name}:Made"))) as (_, client):
        module(text + "# a remark\n")
        client.swap({"l/e": tmp_path / "w"})
        assert np.array_equal(client.forward("l", X), X + 1)


@pytest.mark.parametrize(
    ("differs", "text"),
    [
        ("created", "import time\nclass Made:\n def __init__(self): self.created = time.time_ns()\n"),
        ("inner.made", "import torch, time\nclass Inner(torch.nn.Linear):\n def __init__(self):\n"
         "  super().__init__(3, 3); self.made = time.time_ns()\nclass Made(torch.nn.Module):\n"
         " def __init__(self): super().__init__(); self.inner = Inner()\n"),
        ("weight", "import torch, os\nclass Made(torch.nn.Module):\n def __init__(self):\n  super().__init__()\n"
         "  drawn = torch.frombuffer(bytearray(os.urandom(12)), dtype=torch.int32)\n"
         "  self.weight = torch.nn.Parameter(drawn.double())\n"),
        ("seed", "import os\ndef Made():\n seed = os.urandom(8)\n return lambda x: x if seed else x\n"),
    ],
)  # fmt: skip
def test_a_constructor_that_is_not_the_same_twice_is_refused_at_the_first_start(
    module: Callable[[str], str], differs: str, text: str
) -> None:
    call = " def __call__(self, x): return x\n" if "lambda" not in text else ""
    with (
        pytest.raises(
            FailedPrecondition, match=f"l/e: its constructor does not build the same twice: {differs} differs"
        ),
        serving(lone(Expert(f"{module(text + call)}:Made"))),
    ):
        raise AssertionError("it started")


def test_a_constructor_that_draws_numbers_is_the_same_after_every_restart(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    name = module(
        "import numpy as np, random\nclass Made:\n"
        " def __init__(self): self.by = float(np.random.rand()) + random.random()\n"
        " def __call__(self, x): return x * self.by\n"
    )
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    answers = []
    for _ in range(2):
        with serving(lone(Expert(f"{name}:Made")), state_dir=tmp_path / "state") as (cluster, client):
            answers.append((client.forward("l", X).tobytes(), cluster.status()["versions"]))
    assert answers[0] == answers[1]
    assert np.random.get_state()[1].tolist() == state


def test_the_weights_of_a_live_module_are_swapped_and_its_owner_keeps_its_own(tmp_path: Path) -> None:
    mine = nn.Linear(3, 3)
    kept = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    save_tensors(tmp_path / "w", {"weight": torch.eye(3), "bias": torch.ones(3)})
    layer, options = lone(Expert.from_module(mine)), {"state_dir": tmp_path / "state"}
    with serving(layer, **options) as (_, client):
        first = client.call("l", X)
        version = client.swap({"l/e": tmp_path / "w"}).after["l/e"]
        assert np.array_equal(client.forward("l", X), X + 1)
        assert mine.weight.requires_grad
        assert all(torch.equal(tensor, kept[name]) for name, tensor in mine.state_dict().items())
        client.rollback("l/e")
        assert client.call("l", X).output.tobytes() == first.output.tobytes()
        client.rollback("l/e", to=version)
    with serving(layer, **options) as (_, client):  # registered again: with the weights that were swapped in
        assert client.call("l", X).versions["l/e"] == version
        assert np.array_equal(client.forward("l", X), X + 1)


def test_a_mask_of_infinities_may_be_swapped_and_infinite_weights_may_not(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    name = module(
        "import torch\nclass Masked(torch.nn.Module):\n"
        " def __init__(self):\n  super().__init__(); self.l = torch.nn.Linear(3, 3)\n"
        "  self.register_buffer('mask', torch.full((3, 3), -torch.inf).triu(1))\n"
        " def forward(self, x): return self.l(x)\n"
    )
    good = {"l.weight": torch.eye(3), "l.bias": torch.ones(3), "mask": torch.full((3, 3), -torch.inf).triu(1)}
    save_tensors(tmp_path / "w", good)
    expert = Expert(f"{name}:Masked", weights=tmp_path / "w")
    with serving(lone(expert)) as (_, client):
        assert np.array_equal(client.forward("l", X), X + 1)
        save_tensors(tmp_path / "new", good | {"l.bias": torch.full((3,), 2.0)})
        client.swap({"l/e": tmp_path / "new"})
        assert np.array_equal(client.forward("l", X), X + 2)
        for changed in (
            {"l.weight": torch.eye(3) * torch.inf},
            {"l.bias": torch.tensor([0.0, torch.inf, 0.0])},
            {"mask": good["mask"].T.contiguous()},
            {"mask": -good["mask"]},
            {"mask": torch.full((3, 3), torch.nan)},
        ):
            save_tensors(tmp_path / "bad", good | changed)
            with pytest.raises(FailedPrecondition, match=f"'{next(iter(changed))}' has NaN or infinite values"):
                client.swap({"l/e": tmp_path / "bad"}, allow_norm=True)
        assert np.array_equal(client.forward("l", X), X + 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_modules_are_experts(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(3, 3).eval(), torch.zeros(1, 3))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, tmp_path / "traced.pt")  # type: ignore[no-untyped-call]
    save_tensors(tmp_path / "w", {"weight": torch.eye(3), "bias": torch.ones(3)})
    for expert in (Expert("torch.jit:load", args=(str(tmp_path / "traced.pt"),)), Expert.from_module(traced)):
        with serving(lone(expert), state_dir=tmp_path / str(expert.factory)) as (_, client):
            assert np.allclose(client.forward("l", X), traced(torch.from_numpy(X)).detach().numpy())
            client.swap({"l/e": tmp_path / "w"})
            assert np.array_equal(client.forward("l", X), X + 1)
