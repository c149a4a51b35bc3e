"""Swaps of a running cluster through its client: what is swapped serves, what is refused leaves no trace."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.artefacts import bad_artefacts, sha256_of
from helpers.swap_cluster import EXPERTS, GATE, WIDTH, SwapCluster, Weights, X, layer, matrix, swap_cluster
from helpers.waiting import eventually

from expertmesh import AsyncClient, Cluster, ClusterConfig, Expert, Layer, gates
from expertmesh.cluster.client.upload import LocalFile
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SpecMismatch,
    TooLarge,
)
from expertmesh.experts.host import ExpertHost
from expertmesh.experts.weights.files import save_tensors

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def running(tmp_path: Path) -> Any:
    with swap_cluster(tmp_path, replicas=2) as made:
        yield made


def holds(made: SwapCluster) -> dict[str, set[str]]:
    """Every version that any replica of an expert holds."""
    experts = made.client.status()["layers"]["l"]["experts"]
    return {
        id: {held.split()[1] for replica in expert["replicas"] for held in replica["holds"]}
        for id, expert in experts.items()
    }


def test_one_expert_and_then_a_set_with_the_gate(running: SwapCluster) -> None:
    before, told = running.current(), []
    outcome = running.swap({"l/b": 10}, progress=lambda *seen: told.append(seen))
    assert (outcome.committed, outcome.flipped, outcome.pending) == (True, True, [])
    assert outcome.before == {"l/b": before["l/b"]}
    assert outcome.drift["l/b"] > 0
    assert told[-1][0] == "l/b"
    assert told[-1][1] == told[-1][2]
    reply = running.call()
    assert reply.epoch == outcome.epoch == 2
    assert running.current() == before | outcome.after
    outcome = running.swap({"l/a": 11, "l/c": 12, GATE: 13})
    reply = running.call()
    assert (reply.epoch, outcome.epoch) == (3, 3)
    assert reply.versions[GATE] == outcome.after[GATE] != before[GATE]
    assert running.uploads() == []


def test_what_is_expected_and_what_is_not(running: SwapCluster) -> None:
    before = running.current()
    outcome = running.swap({"l/a": 10}, expect={"l/a": before["l/a"], "l/b": before["l/b"]})
    with pytest.raises(Aborted, match=f"l/a is at {outcome.after['l/a']}, not at {before['l/a']}"):
        running.swap({"l/a": 11}, expect={"l/a": before["l/a"]})
    assert running.current() == before | outcome.after
    assert running.call().epoch == 2
    assert running.uploads() == []


def test_of_swaps_that_race_one_wins_and_the_others_are_told(running: SwapCluster) -> None:
    before = running.current()
    ended: list[Any] = []

    def race(seed: int) -> None:
        try:
            ended.append(running.swap({"l/a": seed}, expect={"l/a": before["l/a"]}))
        except ExpertMeshError as error:
            ended.append(error)

    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(20, 26)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (winner,) = [outcome for outcome in ended if not isinstance(outcome, ExpertMeshError)]
    assert {type(error) for error in ended if isinstance(error, ExpertMeshError)} == {Aborted}
    assert len(ended) == 6
    assert running.current() == before | winner.after
    assert running.call().epoch == 2
    assert running.uploads() == []


def test_every_bad_file_is_refused_with_its_code_and_nothing_changes(
    running: SwapCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    before, answer, held = running.current(), running.call(), holds(running)
    for bad in bad_artefacts(folder, {"weight": torch.from_numpy(matrix(2))}):
        monkeypatch.setattr(LocalFile, "sha256", lambda file, bad=bad: bytes.fromhex(bad.sha256))
        with pytest.raises(ExpertMeshError) as caught:
            running.client.swap({"l/b": bad.path}, max_drift=bad.max_drift)
        assert caught.value.code == bad.code, (bad.name, caught.value)
        arrived = sha256_of(bad.path) == bad.sha256
        for word in bad.words if arrived else ("sha256", "send it again"):
            assert word in str(caught.value), (bad.name, caught.value)
        assert str(tmp_path) not in str(caught.value)
        again = running.call()
        assert np.array_equal(again.output, answer.output)
        assert (again.epoch, again.versions) == (answer.epoch, answer.versions)
    assert running.current() == before
    assert holds(running) == held
    assert running.uploads() == []
    monkeypatch.undo()
    assert running.swap({"l/b": 10}).epoch == 2


def test_a_bad_gate_is_refused_too(running: SwapCluster) -> None:
    answer = running.call()
    with pytest.raises(SpecMismatch, match="gate"):
        running.client.swap({GATE: running.weights.file("l/a", 10)})
    with pytest.raises(ExpertMeshError):
        running.client.swap({"l/a": running.weights.file("l/a", 11), GATE: running.weights.file("l/a", 10)})
    assert running.call().versions == answer.versions


def test_what_cannot_be_asked_for(running: SwapCluster, tmp_path: Path) -> None:
    file = running.weights.file("l/a", 10)
    for changes, kind, said in [
        ({"l/z": file}, NotFound, "there is no expert or gate 'l/z'"),
        ({"l/a": tmp_path / "none.safetensors"}, NotFound, "cannot read"),
        ({"l/a": tmp_path}, NotFound, "cannot read"),
        ({"../l": file}, InvalidRequest, "is not the id"),
        ({"a": file}, InvalidRequest, "is not the id"),
        ({}, InvalidRequest, "say what to swap"),
        ({"l/a": 5}, InvalidRequest, "pass the path of a safetensors file"),
    ]:
        with pytest.raises(kind, match=said):
            running.client.swap(changes)
    for options, said in [
        ({"mode": "triple"}, "mode must be one of double, staged_cpu"),
        ({"max_drift": -1.0}, "max_drift"),
        ({"max_drift": float("nan")}, "cannot be sent"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"swap_id": "a b"}, "swap id"),
        ({"expect": {"l/a": "seven"}}, "is not a version"),
        ({"expect": {"l/a": 7}}, "field expect"),
    ]:
        with pytest.raises(InvalidRequest, match=said):
            running.client.swap({"l/a": file}, **options)
    assert running.call().epoch == 1
    assert running.uploads() == []


def test_a_swap_that_is_asked_for_again_happens_once(running: SwapCluster) -> None:
    outcome = running.swap({"l/a": 10}, swap_id="mine-1")
    again = running.client.swap({"l/a": running.weights.file("l/a", 10)}, swap_id="mine-1")
    assert (again.epoch, again.after, again.committed) == (outcome.epoch, outcome.after, True)
    assert running.call().epoch == 2
    assert running.client.swap_progress("mine-1")["phase"] in ("retiring", "done", "committed")
    broken = running.weights.folder / "broken.safetensors"
    broken.write_bytes(b"no weights")
    for _ in range(2):
        with pytest.raises(DataLoss, match="broken"):
            running.client.swap({"l/a": broken}, swap_id="mine-2")
    with pytest.raises(NotFound, match="no swap 'never'"):
        running.client.swap_progress("never")
    assert running.uploads() == []


def test_a_rehearsal_changes_nothing(running: SwapCluster) -> None:
    before = running.current()
    outcome = running.client.swap(running.weights.files({"l/a": 10, GATE: 11}), dry_run=True)
    assert (outcome.committed, outcome.flipped, outcome.epoch) == (False, False, 0)
    assert outcome.before == {"l/a": before["l/a"], GATE: before[GATE]}
    assert outcome.drift["l/a"] is not None
    assert (running.current(), running.uploads()) == (before, [])
    assert running.call().epoch == 1
    assert len(running.client.history("l/a")) == 1
    with pytest.raises(FailedPrecondition, match="max_drift"):
        running.client.swap(running.weights.files({"l/a": 10}), dry_run=True, max_drift=1e-9)
    assert running.swap({"l/a": 10}).epoch == 2
    eventually(lambda: all(len(versions) == 1 for versions in holds(running).values()), 20, "candidates are unloaded")


def test_rollback_and_history(tmp_path: Path) -> None:
    with swap_cluster(tmp_path, retain_epochs=10) as made:
        check_rollback_and_history(made)


def check_rollback_and_history(running: SwapCluster) -> None:
    first = running.current()
    second = running.swap({"l/a": 10, "l/b": 11}).after
    third = running.swap({"l/a": 12}).after
    kept = running.client.history("l/a")
    assert [item["version"] for item in kept] == [first["l/a"], second["l/a"], third["l/a"]]
    assert [item["current"] for item in kept] == [False, False, True]
    assert [item["parent"] for item in kept] == [None, first["l/a"], second["l/a"]]
    assert [item["epochs"] for item in kept] == [[1], [2], [3]]
    outcome = running.client.rollback("l/a")
    assert (outcome.before, outcome.after) == (third, {"l/a": second["l/a"]})
    assert running.call().versions[GATE] == first[GATE]
    assert running.current() == first | second
    assert running.client.rollback("l/a", to=third["l/a"]).epoch == 5
    both = running.client.rollback("l/a", "l/b", to={"l/a": second["l/a"]})
    assert both.after == {"l/a": second["l/a"], "l/b": first["l/b"]}
    running.call()
    for arguments, options, kind, said in [
        (("l/c",), {}, FailedPrecondition, "no version before"),
        (("l/z",), {}, NotFound, "there is no expert or gate"),
        (("l/a",), {"to": "v9-0123456789ab"}, NotFound, "not registered"),
        (("l/a",), {"to": "latest"}, InvalidRequest, "is not a version"),
        (("l/a",), {"expect": first}, Aborted, "as expected"),
        (("l/a", "l/b"), {"to": first["l/a"]}, InvalidRequest, "several ids"),
        (("l/a",), {"to": {"l/b": first["l/b"]}}, InvalidRequest, "not rolled back"),
        ((), {}, InvalidRequest, "say what to roll back"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=said):
            running.client.rollback(*arguments, **options)
    assert running.call().epoch == 6


def test_weights_of_another_magnitude_come_only_if_they_are_allowed_and_go_back_without_asking(
    running: SwapCluster,
) -> None:
    large = running.weights.folder / "large.safetensors"
    save_tensors(large, {"weight": torch.from_numpy(matrix(10) * 1e6)})
    with pytest.raises(FailedPrecondition, match="allow_norm"):
        running.client.swap({"l/a": large})
    assert running.client.swap({"l/a": large}, allow_norm=True).epoch == 2
    assert running.client.rollback("l/a").epoch == 3
    running.call()


def test_an_epoch_is_answered_again_bit_for_bit_while_it_is_kept(tmp_path: Path) -> None:
    with swap_cluster(tmp_path, retain_epochs=2) as made:
        first = made.call()
        made.swap({"l/a": 10, GATE: 11})
        second = made.call()
        made.swap({"l/a": 12, "l/b": 13})
        eventually(lambda: all(len(versions) == 1 for versions in holds(made).values()), 20, "old versions unloaded")
        for old in (first, second):
            again = made.call(epoch=old.epoch)
            assert (again.epoch, again.versions) == (old.epoch, old.versions)
            assert again.output.tobytes() == old.output.tobytes()
        assert made.call().epoch == 3


def test_an_epoch_that_is_not_kept_or_never_was(tmp_path: Path) -> None:
    with swap_cluster(tmp_path, retain_epochs=1) as made:
        first = made.swap({"l/a": 10})
        old = made.call()
        made.swap({"l/b": 11})
        made.swap({"l/a": 12})
        for number in (1, 2):
            with pytest.raises(FailedPrecondition, match=rf"epoch {number} is not kept any more.*retain_epochs"):
                made.call(epoch=number)
        for number in (99, 0, -1):
            with pytest.raises(NotFound, match=f"there is no epoch {number}"):
                made.call(epoch=number)
        again = made.call(epoch=3)
        assert again.versions.items() >= {id: v for id, v in old.versions.items() if id in (GATE, "l/a")}.items()
        assert first.after["l/a"] in {item["version"] for item in made.client.history("l/a")}


def test_a_lease_holds_an_epoch_across_swaps_of_other_experts(running: SwapCluster) -> None:
    with running.client.pin() as lease:
        old = running.call(pin=lease)
        outcome = running.swap({"l/a": 10, GATE: 11})
        assert running.call().epoch == outcome.epoch == 2
        again = running.call(pin=lease)
        assert (again.epoch, again.output.tobytes()) == (lease.epoch, old.output.tobytes())
        assert running.client.status()["draining"] == {
            id: [outcome.before[id]] for id in sorted(outcome.before)
        }  # fmt: skip
        with pytest.raises(Aborted, match="draining"):
            running.swap({"l/a": 12})
        assert running.swap({"l/b": 13}).epoch == 3
        assert running.call(pin=lease.pin).epoch == lease.epoch
    with pytest.raises(FailedPrecondition, match="pin again"):
        running.call(pin=lease)
    assert running.client.status()["draining"] == {}
    assert running.swap({"l/c": 14}).epoch == 4


def test_a_lease_that_nobody_uses_ends_by_itself(running: SwapCluster) -> None:
    with running.client.pin(ttl=0.05) as lease:
        outcome = running.swap({"l/a": 10})
        eventually(lambda: running.client.status()["draining"] == {}, 20, "the lease has ended")
        with pytest.raises(FailedPrecondition, match="pin again"):
            running.call(pin=lease)
    assert running.call().epoch == outcome.epoch


def test_an_edited_declaration_undoes_no_swap_unless_it_is_asked_for_by_name(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as made:
        declared = made.current()
        made.swap({"l/a": 10, GATE: 11})
        swapped, weights, options = made.current(), made.weights, vars(made.cluster.config)
    edited = replace(
        layer(weights),
        gate=gates.TopK(WIDTH, len(EXPERTS), k=1),
        experts={
            name: Expert(
                "torch.nn:Linear", args=(WIDTH, WIDTH), kwargs={"bias": False}, weights=weights.file("l/x", 20)
            )
            for name in EXPERTS
        },
    )
    options = {**options, "layers": (edited,)}
    said: list[str] = []
    with Cluster.start(config=ClusterConfig(**options), progress=said.append) as cluster:
        versions = cluster.status()["versions"]
    assert {id: versions[id] for id in ("l/a", GATE)} == {id: swapped[id] for id in ("l/a", GATE)}
    assert not {versions[id] for id in ("l/b", "l/c")} & set(declared.values())
    for id in ("l/a", GATE):
        assert (
            f"{id} serves {swapped[id]}, which was swapped in; redeclare {id} to serve its edited declaration" in said
        )
    with pytest.raises(NotFound, match=r"redeclare: there is no expert or gate 'l/z'"):
        Cluster.start(config=ClusterConfig(**options), redeclare=["l/z"])
    for redeclare in (["l/a"], []):  # once is enough
        with Cluster.start(config=ClusterConfig(**options), redeclare=redeclare) as cluster:
            now = cluster.status()["versions"]
        assert now[GATE] == swapped[GATE]
        assert now["l/a"] != swapped["l/a"]
        assert now["l/a"].partition("-")[2] == now["l/b"].partition("-")[2]  # the same declaration, the same digits


def test_what_replace_has_put_there_survives_a_restart_of_the_same_declaration(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as made:
        new = Expert(
            "torch.nn:Linear", args=(WIDTH, WIDTH), kwargs={"bias": False}, weights=made.weights.file("l/x", 20)
        )
        version = made.cluster.replace("l/b", new)
        weights = made.weights
    with swap_cluster(tmp_path, weights=weights) as made:
        assert made.current()["l/b"] == version


def test_a_cold_restart_serves_what_was_swapped_in_with_the_same_bits(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as made:
        made.swap({"l/a": 10, GATE: 11})
        made.swap({"l/b": 12})
        versions, answer, weights = made.current(), made.call(), made.weights
    with swap_cluster(tmp_path, weights=weights) as made:
        assert made.current() == versions
        again = made.call()
        assert (again.epoch, again.cluster) == (answer.epoch, answer.cluster)
        assert again.output.tobytes() == answer.output.tobytes()
        assert made.call(epoch=1).epoch == 1
        assert made.client.rollback("l/b").epoch == 4
        assert made.swap({"l/b": 13}).epoch == 5


def test_a_client_forgets_what_it_saw_of_another_cluster_at_the_same_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    with swap_cluster(one) as made:
        made.swap({"l/a": 10})
        seen = made.client._calls.seen_epoch
        assert seen.options()["min_epoch"] == 2
    with swap_cluster(two) as made:
        object.__setattr__(made.client._calls, "seen_epoch", seen)
        assert made.call(timeout=5.0).epoch == 1
        assert seen.options()["min_epoch"] == 1


def test_roles(running: SwapCluster) -> None:
    file = running.weights.file("l/a", 10)
    with running.as_role(Role.READER) as reader:
        for change in (lambda: reader.swap({"l/a": file}), lambda: reader.rollback("l/a", to=running.current()["l/a"])):
            with pytest.raises(PermissionDenied, match="operator"):
                change()
        assert reader.history("l/a")
        with reader.pin() as lease:
            assert reader.call("l", X, pin=lease).epoch == 1
    with running.as_role(Role.OPERATOR) as operator:
        assert operator.swap({"l/a": file}).epoch == 2
    assert running.uploads() == []


def test_an_operator_sees_and_ends_the_lease_that_holds_up_a_swap(running: SwapCluster) -> None:
    with running.as_role(Role.READER) as reader, running.as_role(Role.OPERATOR) as operator, reader.pin() as lease:
        assert reader.call("l", X, pin=lease).epoch == 1
        running.swap({"l/a": 20})
        with pytest.raises(PermissionDenied, match="operator"):
            reader.leases()
        (listed,) = operator.leases()
        assert (listed["pin"], listed["epoch"], len(listed["holder"])) == (lease.pin, 1, 16)
        assert listed["ends_in"] <= 10.0
        operator.end_lease(lease.pin)
        assert operator.leases() == []
        with pytest.raises(FailedPrecondition, match="pin again"):
            reader.call("l", X, pin=lease)


def test_limits_of_uploads_are_said_by_their_names(tmp_path: Path) -> None:
    with swap_cluster(tmp_path, max_upload_bytes=100) as made:
        with pytest.raises(TooLarge, match="max_upload_bytes is 100"):
            made.swap({"l/a": 10})
        assert made.call().epoch == 1
    other = tmp_path / "other"
    other.mkdir()
    with swap_cluster(other, max_uploads_bytes=100) as made:
        with pytest.raises(TooLarge, match="max_uploads_bytes is 100"):
            made.swap({"l/a": 10})
        assert made.uploads() == []


def test_a_large_file_goes_in_chunks(running: SwapCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.cluster.client.upload.CHUNK_BYTES", 50)
    told: list[tuple[str, int, int]] = []
    running.swap({"l/a": 10}, progress=lambda *seen: told.append(seen))
    size = running.weights.file("l/a", 10).stat().st_size
    assert told == [("l/a", min(size, 50 * number), size) for number in range(1, -(-size // 50) + 1)]
    running.call()


def test_a_file_that_changes_while_it_is_sent_is_refused(running: SwapCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    file = running.weights.file("l/a", 10)
    monkeypatch.setattr("expertmesh.cluster.client.upload.CHUNK_BYTES", 100)

    def grow(id: str, sent: int, total: int) -> None:
        if sent == 100:
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(DataLoss, match="send it again"):
        running.client.swap({"l/a": file}, progress=grow)

    def shrink(id: str, sent: int, total: int) -> None:
        file.write_bytes(b"")

    with pytest.raises(DataLoss, match="became shorter"):
        running.client.swap({"l/a": file}, progress=shrink)
    assert running.call().epoch == 1


def test_the_asynchronous_client_does_the_same(running: SwapCluster) -> None:
    async def drained(client: AsyncClient) -> Any:
        """Roll back as soon as the controller has heard that the lease is over."""
        while True:
            try:
                return await client.rollback("l/a")
            except Aborted:
                await asyncio.sleep(0.01)

    async def main() -> None:
        async with AsyncClient(running.cluster.endpoint) as client:
            async with client.pin() as lease:
                outcome = await client.swap(running.weights.files({"l/a": 10}))
                running.weights.became(outcome.after, {"l/a": 10})
                old = await client.call("l", X, pin=lease)
                new = await client.call("l", X)
                assert (old.epoch, new.epoch) == (1, 2)
                running.weights.check(old)
                running.weights.check(new)
            assert (await drained(client)).epoch == 3
            assert len(await client.history("l/a")) == 2

    asyncio.run(main())


def test_a_swap_goes_on_when_its_caller_has_gone(running: SwapCluster) -> None:
    with pytest.raises(DeadlineExceeded, match=r"outcome of swap gone-1 is unknown.*swap_id='gone-1'"):
        _impatient(running).swap(running.weights.files({"l/a": 10}), swap_id="gone-1")
    outcome = running.swap({"l/a": 10}, swap_id="gone-1")
    assert (outcome.committed, outcome.epoch) == (True, 2)
    assert running.call().epoch == 2


def test_a_swap_that_is_not_staged_in_time_is_undone(running: SwapCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    release, stage = threading.Event(), ExpertHost.stage

    def late(host: ExpertHost, *arguments: Any, **options: Any) -> Any:
        assert release.wait(60)
        return stage(host, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertHost, "stage", late)
        with pytest.raises(DeadlineExceeded, match=r"was not staged in time: l/a#[01] for l/a"):
            running.client.swap(running.weights.files({"l/a": 10, "l/b": 11}), timeout=0.2)
        assert running.call().epoch == 1
        assert running.uploads() == []
        release.set()
    assert running.swap({"l/a": 12}).epoch == 2
    running.call()


def _impatient(made: SwapCluster) -> Any:
    """A client whose swaps end long before any answer can come."""
    client = made.as_role(Role.ADMIN)
    calls = client._calls
    ask = type(calls)._ask

    class Impatient(type(calls)):  # type: ignore[misc]
        def _ask(self, method: str, meta: Any, tensors: Any, timeout: Any, request_id: Any) -> Any:
            timeout = 0.001 if method == "Swap" else timeout
            return (yield from ask(self, method, meta, tensors, timeout, request_id))

    calls.__class__ = Impatient
    return client


def test_another_factory_for_the_same_rows_serves_and_survives_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"allowed_factories": ["helpers.samples:Affine", "helpers.samples:narrow"]}
    with swap_cluster(tmp_path, **options) as made:
        with pytest.raises(PermissionDenied, match="allowed_factories"):
            made.client.swap({"l/a": {"factory": "torch.nn:Linear", "args": [4, 4]}})
        with pytest.raises(ExpertMeshError):
            made.client.swap({"l/a": {"factory": "helpers.samples:Affine", "args": [5]}})
        with pytest.raises(InvalidRequest, match="is a gate"):
            made.client.swap({GATE: {"factory": "helpers.samples:Affine"}})
        with pytest.raises(InvalidRequest, match="unknown field 'colour'"):
            made.client.swap({"l/a": {"factory": "helpers.samples:Affine", "colour": "red"}})
        outcome = made.client.swap({"l/a": {"factory": "helpers.samples:Affine", "kwargs": {"scale": 3.0}}})
        made.weights.known["l/a", outcome.after["l/a"]] = np.eye(4, dtype=np.float32) * 3
        answer, weights = made.call(), made.weights
        assert answer.epoch == 2
    with swap_cluster(tmp_path, weights=weights, **options) as made:
        assert np.array_equal(made.call().output, answer.output)
        assert made.client.rollback("l/a").epoch == 3
        made.call()


def test_an_expert_without_tensors_takes_no_weights(tmp_path: Path) -> None:
    layer = Layer("l", gates.Fixed([1.0]), {"a": Expert("torch:sin")})
    weights = Weights(tmp_path)
    with Cluster.start([layer], transport="local", port=0, name="swaps", state_dir=tmp_path / "state") as cluster:
        made = SwapCluster(cluster, weights)
        with made.client as client, pytest.raises(FailedPrecondition, match="no tensors"):
            client.swap({"l/a": weights.file("l/a", 1)})
