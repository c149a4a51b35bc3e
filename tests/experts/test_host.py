"""The host: exactly the version that is asked for, and one part that fails harms no other."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.router_in_process import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts.errors import ConfigError, ExpertMeshError, NotFound, SpecMismatch
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.protocol import ExpertCall, Part, PartFailure, PartialSum
from expertmesh.experts.spec import Expert, TensorSpec
from expertmesh.experts.staging.stage import Proposal
from expertmesh.router.fanout.replica_view import READY
from expertmesh.router.fanout.transport import report_of

ROWS = torch.arange(12.0).reshape(3, 4)
FAILING = {
    "helpers.samples:raises": "raised ZeroDivisionError; see the log",
    "helpers.samples:leaves": "raised SystemExit; see the log",
    "helpers.samples:panics": "raised Panic; see the log",
    "helpers.samples:interrupts": "raised KeyboardInterrupt; see the log",
    "helpers.samples:sparse": "returned a sparse_coo tensor",
    "helpers.samples:deep": "returned 10 dimensions",
    "helpers.samples:text": "must return a tensor or an array; this one returned str",
    "helpers.samples:narrow": "returned shape",
    "helpers.samples:complex_rows": "complex64",
    "torch:mm": "raised TypeError",
}


def call(*parts: tuple[str, str, list[int]], rows: Tensor = ROWS) -> ExpertCall:
    start, made, index = 0, [], []
    for expert, version, chosen in parts:
        made.append(Part(expert, version, start, start + len(chosen)))
        index += chosen
        start += len(chosen)
    return ExpertCall(1, tuple(made), rows, torch.tensor(index, dtype=torch.int64))


def tensor_of(output: Any) -> Tensor:
    assert isinstance(output, Tensor)
    return output


def host_of(**factories: str) -> tuple[ExpertHost, dict[str, str]]:
    host = ExpertHost()
    return host, {name: load(host, name, Expert(factory), 1).version for name, factory in factories.items()}


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(st.integers(0, 2), max_size=5)), max_size=4))
@settings(deadline=None)
def test_every_part_gets_the_answers_to_its_rows(parts: list[tuple[str, list[int]]]) -> None:
    host, versions = host_of(a="torch:sin", b="numpy:square")
    reply = host.compute(call(*((name, versions[name], chosen) for name, chosen in parts)))
    assert reply.incarnation == host.incarnation
    for (name, chosen), output in zip(parts, reply.outputs, strict=True):
        wanted = ROWS[chosen].sin() if name == "a" else ROWS[chosen].square()
        assert torch.equal(tensor_of(output), wanted)


@pytest.mark.parametrize("factory", FAILING)
def test_a_part_that_fails_harms_no_other_and_tells_no_secret(factory: str) -> None:
    host, versions = host_of(good="torch:sin", bad=factory)
    good = ("good", versions["good"], [0, 1, 2])
    first, failed, last = host.compute(call(good, ("bad", versions["bad"], [0, 2]), good)).outputs
    assert torch.equal(tensor_of(first), ROWS.sin())
    assert torch.equal(tensor_of(last), ROWS.sin())
    assert isinstance(failed, PartFailure)
    assert failed.error == "ExpertFailed"
    assert failed.message.startswith("bad")
    assert FAILING[factory] in failed.message
    assert "secret" not in failed.message


def test_a_version_that_is_not_held_is_refused_and_never_replaced_by_another() -> None:
    host, versions = host_of(a="torch:sin")
    for expert, version in (("a", "v2-000000000000"), ("b", versions["a"]), ("a", versions["a"][:-1])):
        (refused,) = host.compute(call((expert, version, [0]))).outputs
        assert refused == PartFailure("VersionGone", f"{expert} {version} is not loaded in this replica")


def test_two_versions_of_one_expert_are_held_side_by_side() -> None:
    host = ExpertHost()
    old = load(host, "e", Expert("helpers.samples:Affine", kwargs={"scale": 2.0}), 1)
    new = load(host, "e", Expert("helpers.samples:Affine", kwargs={"scale": 3.0}), 2)
    assert old.version.startswith("v1-")
    assert new.version.startswith("v2-")
    assert host.holds() == {("e", old.version), ("e", new.version)}
    one, two = host.compute(call(("e", old.version, [1]), ("e", new.version, [1]))).outputs
    assert torch.equal(tensor_of(one), ROWS[[1]] * 2)
    assert torch.equal(tensor_of(two), ROWS[[1]] * 3)
    host.unload("e", old.version)
    one, two = host.compute(call(("e", old.version, [1]), ("e", new.version, [1]))).outputs
    assert isinstance(one, PartFailure)
    assert torch.equal(tensor_of(two), ROWS[[1]] * 3)
    with pytest.raises(NotFound, match=f"e {old.version} is not loaded in this replica"):
        host.unload("e", old.version)


def test_what_is_loaded_is_told_with_its_rows_and_size() -> None:
    host = ExpertHost()
    loaded = load(host, "l/e", Expert("torch.nn:Linear", args=(4, 2)), 3)
    assert (loaded.input, loaded.output, loaded.nbytes) == (TensorSpec((4,)), TensorSpec((2,), "float32"), 40)
    assert host.holds() == {("l/e", loaded.version)}


def test_two_hosts_agree_on_a_version_and_have_incarnations_of_their_own() -> None:
    one, other = ExpertHost(), ExpertHost()
    declared = Expert("torch.nn:Linear", args=(4, 4))
    assert load(one, "e", declared).version == load(other, "e", declared).version
    assert one.incarnation != other.incarnation


def test_a_module_that_remembers_its_rows_has_one_version_in_every_replica() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, rows: Tensor) -> Tensor:
            self.calls += 1
            return rows

    declared = {"input": TensorSpec((4,))}
    versions = {load(ExpertHost(), "e", Expert.from_module(Counting(), **declared), 1).version for _ in range(2)}
    assert len(versions) == 1


@pytest.mark.parametrize(
    ("expert", "kind"),
    [
        (Expert("helpers.samples:make_trouble"), ConfigError),
        (Expert("helpers.samples:raises", input=TensorSpec((4,))), SpecMismatch),
        (Expert("torch.nn:Linear", args=(4, 4), weights=Path("/nowhere/w.safetensors")), NotFound),
    ],
)
def test_what_cannot_be_loaded_leaves_the_host_as_it_was(expert: Expert, kind: type[ExpertMeshError]) -> None:
    host, versions = host_of(e="torch:sin")
    before = host.holds()
    with pytest.raises(kind):
        load(host, "e", expert, 2)
    assert host.holds() == before
    assert torch.equal(tensor_of(host.compute(call(("e", versions["e"], [0]))).outputs[0]), ROWS[[0]].sin())


BUFFER = torch.zeros(3, 4)


def doubles_in_place(rows: Tensor) -> Tensor:
    return torch.mul(rows, 2, out=BUFFER[: len(rows)])


def halves_in_place(rows: Tensor) -> Tensor:
    return torch.mul(rows, 0.5, out=BUFFER[: len(rows)])


@pytest.mark.parametrize("summed", [False, True])
def test_experts_that_share_one_buffer_do_not_overwrite_each_other(summed: bool) -> None:
    host = ExpertHost()
    versions = {
        name: load(host, name, Expert.from_function(function)).version
        for name, function in {"a": doubles_in_place, "b": halves_in_place}.items()
    }
    asked = call(("a", versions["a"], [0, 1, 2]), ("b", versions["b"], [0, 1, 2]), ("a", versions["a"], [2, 1, 0]))
    if not summed:
        answers = [tensor_of(output) for output in host.compute(asked).outputs]
        wanted = (ROWS * 2, ROWS * 0.5, ROWS.flip(0) * 2)
        assert all(torch.equal(answer, rows) for answer, rows in zip(answers, wanted, strict=True))
        return
    summing = replace(asked, weights=torch.ones(9), sums=(PartialSum(0, 3, 0, 3),))
    assert torch.equal(tensor_of(host.compute(summing).sums[0]), ROWS * 4.5)


def test_an_answer_stays_as_it_was_when_its_expert_runs_again() -> None:
    host = ExpertHost()
    version = load(host, "e", Expert.from_function(doubles_in_place)).version
    first = tensor_of(host.compute(call(("e", version, [0, 1, 2]))).outputs[0])
    host.compute(call(("e", version, [2, 2, 2])))
    assert torch.equal(first, ROWS * 2)


def test_answers_of_a_host_need_no_gradient_and_leave_the_rows_alone() -> None:
    host, versions = host_of(e="torch:exp_")
    rows = ROWS.clone()
    (answer,) = host.compute(call(("e", versions["e"], [0, 0]), rows=rows)).outputs
    assert torch.equal(tensor_of(answer), ROWS[[0, 0]].exp())
    assert torch.equal(rows, ROWS)


def test_experts_come_and_go_while_others_compute() -> None:
    host, versions = host_of(a="torch:sin")
    wrong: list[object] = []

    def compute() -> None:
        for _ in range(200):
            (answer,) = host.compute(call(("a", versions["a"], [0, 1]))).outputs
            if not torch.equal(tensor_of(answer), ROWS[:2].sin()):
                wrong.append(answer)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for counter in range(50):
        loaded = load(host, "b", Expert("helpers.samples:relu"), counter)
        host.holds()
        host.unload("b", loaded.version)
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_new_version_that_does_not_return_is_overdue_and_the_others_serve_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.router.fanout.transport.HUNG_SECONDS", 0.0)
    tried, let_go = threading.Event(), threading.Event()

    def hangs(rows: Tensor) -> Tensor:
        tried.set()
        let_go.wait(30)
        return rows

    host, versions = host_of(a="torch:sin")
    expert = Expert.from_function(hangs)
    proposal = Proposal(id="l/b", counter=1, expert=expert, input=TensorSpec((4,)), timeout=0.0)
    thread = threading.Thread(target=host.stage, args=(proposal,))
    thread.start()
    try:
        assert tried.wait(30)
        report = report_of("r", host, "its process is ended")
        assert report.state == READY
        assert report.problem.startswith("the new version of l/b has not returned")
        assert host.overdue(60.0) is None
        (answer,) = host.compute(call(("a", versions["a"], [0]))).outputs
        assert torch.equal(tensor_of(answer), ROWS[:1].sin())
    finally:
        let_go.set()
        thread.join()
    assert host.overdue(0.0) is None


def test_whole_numbers_are_refused_only_where_the_error_says_so_and_none_were_answered_and_it_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = ExpertHost()
    linear = load(host, "linear", Expert("torch.nn:Linear", args=(4, 2))).version
    embedding = load(host, "embedding", Expert("torch.nn:Embedding", args=(5, 2))).version

    def answer(name: str, version: str, rows: Tensor) -> Any:
        return host.compute(call((name, version, [0]), rows=rows)).outputs[0]

    for _ in range(2):
        outside = answer("embedding", embedding, torch.tensor([[5, 1]]))
        assert outside == PartFailure("ExpertFailed", "embedding raised IndexError; see the log of its replica")
        assert tensor_of(answer("embedding", embedding, torch.tensor([[4, 1]]))).shape == (1, 2, 2)
    caplog.clear()
    refused = answer("linear", linear, ROWS.long())
    assert (refused.error, "refuses rows of int64" in refused.message) == ("SpecMismatch", True)
    assert [record.message for record in caplog.records] == ["expert raised"]
