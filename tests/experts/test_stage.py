"""Staging: what is good is put beside the old, what is bad is refused, and the old serves on unchanged."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import stage_samples
from helpers.artefacts import BadArtefact, bad_artefacts, sha256_of
from helpers.router_in_process import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expertmesh.experts.construct.factory import RowFunction, build
from expertmesh.experts.errors import (
    ConfigError,
    DataLoss,
    ExpertMeshError,
    FailedPrecondition,
    NotFound,
    SpecMismatch,
    TooLarge,
)
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.staging.stage import Proposal, Receipt, stage
from expertmesh.experts.staging.verify import Policy
from expertmesh.experts.weights.files import save_tensors, tensor_digest
from expertmesh.experts.weights.inspect import ArtefactLimits

LINEAR = Expert("torch.nn:Linear", args=(4, 4))
ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)


def state_of(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 4, generator=generator) * scale,
        "bias": torch.randn(4, generator=generator) * scale,
    }


def offered(weights: Any, expert: Expert = LINEAR, **options: Any) -> Proposal:
    return Proposal(id="news/e3", counter=8, expert=expert, weights=weights, **options)


def staged(proposal: Proposal, old: RowFunction | None, **options: Any) -> tuple[RowFunction, Receipt]:
    return stage(proposal, old, incarnation="abc", **options)


def answers(function: RowFunction) -> Tensor:
    with torch.inference_mode():
        return function(ROWS)


@pytest.fixture(scope="module")
def old() -> RowFunction:
    return build(LINEAR)


NAMES = [
    "wrong_shape", "wrong_dtype", "missing_key", "extra_key", "nan", "infinite", "all_zero", "norm_times_5000",
    "wrong_but_finite", "truncated", "header_only", "half_written", "other_file", "no_weights_file",
    "header_of_exabytes", "header_too_long", "many_entries", "deep_header", "overlapping",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, old: RowFunction) -> dict[str, BadArtefact]:
    return {bad.name: bad for bad in bad_artefacts(tmp_path_factory.mktemp("secret"), old.state())}


def test_the_table_is_the_one_that_is_run(table: dict[str, BadArtefact]) -> None:
    assert list(table) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_artefact_is_refused_and_the_old_serves_on(
    name: str, table: dict[str, BadArtefact], old: RowFunction
) -> None:
    bad, before, digest = table[name], answers(old), tensor_digest(old.state())
    proposal = offered(bad.path, sha256=bad.sha256, policy=Policy(max_drift=bad.max_drift))
    tracemalloc.start()
    with pytest.raises(ExpertMeshError) as caught:
        staged(proposal, old)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == bad.code
    assert caught.value.message.startswith("news/e3: ")
    for word in bad.words:
        assert word in caught.value.message
    assert "secret" not in caught.value.message
    assert "/" not in caught.value.message.removeprefix("news/e3")
    assert peak < 16 * 2**20
    assert torch.equal(answers(old), before)
    assert tensor_digest(old.state()) == digest


def test_a_good_file_is_staged_beside_the_old(old: RowFunction, tmp_path: Path) -> None:
    before = answers(old)
    new = state_of(1)
    save_tensors(tmp_path / "w", new)
    ticks = iter([1.0, 3.5])
    proposal = offered(tmp_path / "w", sha256=sha256_of(tmp_path / "w"))
    function, receipt = staged(proposal, old, clock=lambda: next(ticks))
    assert torch.equal(answers(function), nn.functional.linear(ROWS, new["weight"], new["bias"]))
    assert torch.equal(answers(old), before)
    assert (receipt.id, receipt.incarnation, receipt.seconds, receipt.nbytes) == ("news/e3", "abc", 2.5, 80)
    assert receipt.tensor_digest == tensor_digest(new)
    assert receipt.drift is not None
    assert 0.1 < receipt.drift < 100
    assert (receipt.input.shape, receipt.output) == ((4,), TensorSpec((4,), "float32"))


def test_a_version_has_the_name_that_a_restart_gives_it(old: RowFunction, tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", state_of(1))
    _, from_file = staged(offered(tmp_path / "w"), old)
    _, from_tensors = staged(offered(state_of(1)), None)
    _, declared = staged(offered(None, replace(LINEAR, weights=tmp_path / "w")), old)
    loaded = load(ExpertHost(), "news/e3", replace(LINEAR, weights=tmp_path / "w"), 8)
    assert {from_file.version, from_tensors.version, declared.version} == {loaded.version}
    assert from_file.digest.startswith(loaded.version.removeprefix("v8-"))
    staged(offered(tmp_path / "w", version=loaded.version), old)
    with pytest.raises(FailedPrecondition, match=f"it was built as {loaded.version}, but v8-000000000000 was expected"):
        staged(offered(tmp_path / "w", version="v8-000000000000"), old)


state_dicts = st.builds(state_of, st.integers(0, 2**30), st.floats(0.1, 10))


@given(state=state_dicts, in_file=st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_valid_state_passes(state: dict[str, Tensor], in_file: bool, old: RowFunction, tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", state)
    function, receipt = staged(offered(tmp_path / "w" if in_file else state), old)
    assert receipt.tensor_digest == tensor_digest(state) == tensor_digest(function.state())


def test_a_version_is_named_by_what_is_read_back_and_not_by_what_was_sent() -> None:
    function, receipt = staged(offered(state_of(1), Expert("helpers.stage_samples:Folded")), None)
    assert receipt.tensor_digest == tensor_digest(function.state()) != tensor_digest(state_of(1))


@pytest.mark.parametrize(
    ("factory", "kind", "words"),
    [
        ("Deaf", DataLoss, "what was sent for 'bias': .*not applied"),
        ("Uninitialised", DataLoss, "what was sent for 'bias', 'weight': .*uninitialised memory"),
        ("Loose", FailedPrecondition, "staging raised KeyError; see the log of its replica"),
    ],
)
def test_tensors_that_were_not_applied(factory: str, kind: type[ExpertMeshError], words: str) -> None:
    expert = Expert(f"helpers.stage_samples:{factory}")
    with pytest.raises(kind, match=f"^news/e3: .*{words}") as caught:
        staged(offered(state_of(1), expert), build(expert))
    assert "secret" not in caught.value.message


def test_a_constructor_that_raises_what_is_no_exception_is_a_refusal() -> None:
    expert = Expert("helpers.samples:make_panic")
    with pytest.raises(FailedPrecondition, match=r"^news/e3: staging raised Panic; see the log of its replica"):
        staged(Proposal(id="news/e3", counter=1, expert=expert), None)


@pytest.mark.parametrize(
    ("bias", "kind", "words"),
    [
        (10.0, FailedPrecondition, "it raised ZeroDivisionError on probe rows"),
        (11.0, FailedPrecondition, "it raised SystemExit on probe rows"),
        (12.0, FailedPrecondition, "answers 8 of 8 probe rows with NaN or infinity"),
        (13.0, FailedPrecondition, r"answers probe rows with \[2\] float32"),
        (14.0, FailedPrecondition, r"answers probe rows with \[4\] int64"),
        (15.0, TooLarge, "cpu ran out of memory"),
        (16.0, TooLarge, "cpu ran out of memory"),
    ],
)
def test_an_expert_that_breaks_with_its_new_weights(bias: float, kind: type[ExpertMeshError], words: str) -> None:
    expert = Expert("helpers.stage_samples:Fussy", input=TensorSpec((4,)))
    good = build(expert)
    with pytest.raises(kind, match=f"^news/e3: .*{words}") as caught:
        staged(offered({"weight": torch.eye(4), "bias": torch.full((4,), bias)}, expert), good)
    assert "secret" not in caught.value.message
    staged(offered(state_of(2), expert), good)


def test_a_drift_above_its_bound_and_one_that_cannot_be_measured(old: RowFunction) -> None:
    drift = staged(offered(state_of(1), policy=Policy(max_drift=1e6)), old)[1].drift
    assert drift is not None
    with pytest.raises(FailedPrecondition, match=r"max_drift is 0\.01"):
        staged(offered(state_of(1), policy=Policy(max_drift=0.01)), old)
    bounded = Policy(max_drift=0.01)
    with pytest.raises(FailedPrecondition, match="declare the expert's input shape"):
        staged(offered(None, Expert("torch:sin"), policy=bounded), build(Expert("torch:sin")))
    sin = offered(None, Expert("torch:sin"), policy=bounded, input=TensorSpec((4,)))
    assert staged(sin, build(Expert("torch:sin")))[1].drift == 0


def test_how_a_version_was_made_stays_with_it(old: RowFunction) -> None:
    made = [stage_of(id, recipe=recipe) for recipe in (1, 2) for id in ("l/a", "l/b")]
    assert made[0].digest == made[1].digest  # as before: the seed did not depend on the id
    assert len({receipt.digest for receipt in made}) == 3


def stage_of(id: str, **options: Any) -> Receipt:
    return staged(Proposal(id=id, counter=1, expert=LINEAR, **options), None)[1]


class HidesState:
    """An expert that holds what a digest cannot see."""

    def __init__(self) -> None:
        self.held = np.random.default_rng(1)

    def __call__(self, rows: Tensor) -> Tensor:
        return rows


def test_what_was_not_run_says_so(old: RowFunction) -> None:
    unknown = Expert("helpers.samples:Affine")
    serving = build(unknown)
    first = staged(offered(None, unknown), None)[1]
    assert (first.verified, first.unmeasured) == (False, "not run, because no rows were declared or served")
    assert staged(offered(None, unknown), serving)[1].verified  # the same code
    assert not staged(offered(None, Expert("torch:sin")), serving)[1].verified
    assert staged(offered(None, Expert("torch:sin"), input=TensorSpec((4,))), None)[1].verified
    hidden = Expert.from_function(HidesState())
    for names_code in (False, True):  # weights for what serves, or another object that looks the same
        receipt = staged(offered(None, hidden, names_code=names_code), build(hidden))[1]
        assert receipt.verified is not names_code
    serving(torch.ones(2, 4, dtype=torch.float64))
    assert serving.served == TensorSpec((4,), "float64")
    function, receipt = staged(offered(None, Expert("torch:sin")), serving)
    assert (receipt.verified, receipt.unmeasured, function.served) == (True, "", serving.served)
    assert receipt.drift is not None
    assert serving.on(torch.device("cpu")).served == serving.served
    with pytest.raises(FailedPrecondition, match="raised ZeroDivisionError on probe rows"):
        staged(offered(None, Expert("helpers.samples:raises")), serving)


def test_a_norm_that_is_off_is_allowed_by_hand(old: RowFunction) -> None:
    large = {name: value * 5000 for name, value in old.state().items()}
    with pytest.raises(FailedPrecondition, match="a factor of 5000"):
        staged(offered(large), old)
    assert staged(offered(large, policy=Policy(allow_norm=True)), old)[1].drift == pytest.approx(4999)


def test_another_factory_of_the_same_rows_may_take_the_place(old: RowFunction) -> None:
    function, receipt = staged(offered(None, Expert("torch:sin")), build(LINEAR))
    assert torch.equal(answers(function), ROWS.sin())
    assert receipt.drift is None
    wide = Expert("torch.nn:Linear", args=(4, 5))
    for output in (TensorSpec((4,)), TensorSpec()):
        with pytest.raises((SpecMismatch, FailedPrecondition), match=r"\[5\] float32.*\[4\]"):
            staged(offered(None, wide, output=output), old)
    with pytest.raises(
        SpecMismatch, match=r"it takes rows of \[5\].*the layer's rows are \[4\].*swap in an expert that fits"
    ):
        staged(offered(None, Expert("torch.nn:Linear", args=(5, 4)), input=TensorSpec((4,))), old)


def test_weights_must_fit_another_factory_before_they_touch_it(old: RowFunction) -> None:
    with pytest.raises(
        SpecMismatch, match=r"it does not fit the expert: .*'weight' is \[4, 4\] float32, but the expert has \[5, 4\]"
    ):
        staged(offered(state_of(1), Expert("torch.nn:Linear", args=(4, 5))), old)
    with pytest.raises(SpecMismatch, match=r"plain function .*: leave out weights"):
        staged(offered(state_of(1), Expert("torch:sin")), old)
    with pytest.raises(NotFound, match="'none'"):
        staged(offered(Path("none")), old)


def test_a_live_module_is_copied_so_that_the_one_that_serves_stays_as_it_is() -> None:
    live = nn.Linear(4, 4)
    expert = Expert.from_module(live)
    serving = build(expert)
    before = answers(serving)
    function, _ = staged(offered(state_of(3), expert), serving)
    assert torch.equal(answers(serving), before)
    assert not torch.equal(answers(function), before)
    with pytest.raises(SpecMismatch, match="missing 'bias'"):
        staged(offered({"weight": torch.ones(4, 4)}, expert), serving)


def test_a_live_object_that_cannot_be_copied() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: object) -> Single:
            raise TypeError("there is only one")

    expert = Expert.from_module(Single(4, 4))
    with pytest.raises(ConfigError, match=r"the live Single cannot be copied.*there is only one"):
        staged(offered(state_of(1), expert), None)


def test_what_does_not_fit_is_refused_before_anything_is_built(
    old: RowFunction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr("expertmesh.experts.staging.stage.build", lambda *arguments: built.append(arguments))
    save_tensors(tmp_path / "w", {"weight": torch.ones(4, 5)})
    for weights in (tmp_path / "w", {"weight": torch.ones(4, 5)}):
        with pytest.raises(SpecMismatch, match=r"'weight' is \[4, 5\] float32"):
            staged(offered(weights), old)
    assert not built


def test_memory_is_looked_at_before_anything_is_built(old: RowFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr("expertmesh.experts.staging.stage.build", lambda *arguments: built.append(arguments))
    with pytest.raises(TooLarge, match=r"^news/e3: the new version has 80 bytes, .*on cpu .*only 95 bytes are"):
        staged(offered(state_of(1)), old, free=lambda _: 95)
    with pytest.raises(TooLarge, match=r'free on cuda:0 .*only 95 bytes are: stage it with mode="staged_cpu"'):
        staged(offered(state_of(1)), old, device="cuda:0", free=lambda device: 95 if device == "cuda:0" else 10**9)
    with pytest.raises(TooLarge, match="the new version has 80 bytes"):
        staged(offered(None), old, free=lambda _: 0)
    assert not built


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_memory_that_runs_out_while_building_leaves_nothing(error: Exception) -> None:
    expert = Expert("helpers.stage_samples:Hungry")
    serving = build(expert)
    gc.collect()
    before = sum(type(found) is stage_samples.Hungry for found in gc.get_objects())
    stage_samples.OUT_OF_MEMORY.append(error)
    try:
        with pytest.raises(TooLarge, match=r"^news/e3: cpu ran out of memory while it held both versions"):
            staged(offered(state_of(1), expert), serving)
    finally:
        stage_samples.OUT_OF_MEMORY.clear()
    assert sum(type(found) is stage_samples.Hungry for found in gc.get_objects()) == before
    staged(offered(state_of(1), expert), serving)


def test_limits_are_handed_on(old: RowFunction, tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", state_of(1))
    with pytest.raises(TooLarge, match="max_tensors"):
        staged(offered(tmp_path / "w"), old, limits=ArtefactLimits(max_tensors=1))


def test_a_file_that_is_exchanged_after_inspection_is_noticed(
    old: RowFunction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "w", state_of(1))
    monkeypatch.setattr("expertmesh.experts.staging.stage.load_tensors", lambda path: (state_of(2), {}))
    with pytest.raises(DataLoss, match=r"what was sent for 'bias', 'weight':"):
        staged(offered(tmp_path / "w"), old)
