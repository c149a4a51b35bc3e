"""Experts and layers come and go in a cluster within this process, under traffic, and outlive a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.changing_layer import ROWS, Ledger, Recomputed, X, expert, gate, layer
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.cluster.config.layer_changes import LayerEdit, LayersRequest
from expertmesh.cluster.control.controller import Controller
from expertmesh.experts.errors import ExpertMeshError, FailedPrecondition, InvalidRequest, NotFound, Unavailable
from expertmesh.experts.weights.files import save_tensors

pytestmark = [pytest.mark.usefixtures("own_home"), pytest.mark.filterwarnings("ignore::UserWarning")]
NAME = "layers"
THREE = {"a": 2, "b": 3, "c": 5}


@contextmanager
def running(folder: Path, *layers: Layer, **options: Any) -> Iterator[tuple[Cluster, Client]]:
    settings: dict[str, Any] = {"transport": "local", "port": 0, "name": NAME, "state_dir": folder / "state"}
    with (
        Cluster.start(layers or [layer(THREE)], **settings, **options) as cluster,
        Client(name=NAME) as client,
    ):
        yield cluster, client


def replicas(cluster: Cluster) -> list[str]:
    return sorted(cluster.status()["replicas"])


def total(factors: Mapping[str, int], weights: gates.Fixed) -> float:
    return float(sum(w * by for w, by in zip(weights.config()["weights"], factors.values(), strict=True)))


def test_experts_come_and_go_under_traffic_and_no_answer_mixes(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        ledger, factors = Ledger(), dict(THREE)
        ledger.knows(cluster.status()["versions"], factors, gate(3))
        callers = Recomputed(client, ledger)
        with callers:
            for number in range(8):
                cluster.add_expert("l/d", expert(7 + number), gate=gate(4, number))
                factors["d"] = 7 + number
                ledger.knows(cluster.status()["versions"], factors, gate(4, number))
                callers.go_on()
                gone = "abc"[number % 3]
                cluster.remove_expert(f"l/{gone}", gate=gate(3, number))
                del factors[gone]
                ledger.knows(cluster.status()["versions"], factors, gate(3, number))
                callers.go_on()
                cluster.add_expert(f"l/{gone}", expert(11 + number), gate=gate(4, number + 5))
                factors[gone] = 11 + number
                ledger.knows(cluster.status()["versions"], factors, gate(4, number + 5))
                cluster.remove_expert("l/d", gate=gate(3, number + 9))
                del factors["d"]
                ledger.knows(cluster.status()["versions"], factors, gate(3, number + 9))
        assert callers.problems() == []
        assert callers.unavailable == 0
        assert {len(reply.versions) for _, reply in callers.answers} == {4, 5}
        eventually(lambda: replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"], 10, "no replica is left over")
        assert client.status()["not_declared"] == {}


def test_a_change_is_one_epoch_and_says_what_it_was(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        before = cluster.status()["epoch"]
        outcome = cluster.add_expert("l/d", expert(7), gate=gate(4))
        assert outcome["epoch"] == cluster.status()["epoch"] == before + 1
        assert outcome["layers"] == {"l": {"before": ["a", "b", "c"], "after": ["a", "b", "c", "d"]}}
        assert outcome["versions"] == {id: cluster.status()["versions"][id] for id in ("l/d", "l/gate")}
        assert client.call("l", X).epoch == before + 1
        assert [*client.status()["layers"]["l"]["experts"]] == ["l/a", "l/b", "l/c", "l/d"]


def test_a_lease_keeps_an_expert_that_was_removed(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        with client.pin() as lease:
            cluster.remove_expert("l/c", gate=gate(2), timeout=1.0)
            assert "l/c#0" in cluster.status()["replicas"]
            np.testing.assert_array_equal(client.call("l", X, pin=lease).output, total(THREE, gate(3)) * X)
            np.testing.assert_array_equal(client.forward("l", X), (1 * 2 + 2 * 3) * X)
            cluster.scale("l/a", 2)
            np.testing.assert_array_equal(client.call("l", X, pin=lease).output, total(THREE, gate(3)) * X)
        eventually(lambda: replicas(cluster) == ["l/a#0", "l/a#1", "l/b#0"], 20, "its replica is ended in the end")


def test_a_lease_keeps_a_layer_that_was_removed(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        cluster.add_layer(Layer("m", gate(1), {"x": expert(9)}, input=ROWS))
        with client.pin() as lease:
            cluster.remove_layer("m", timeout=1.0)
            np.testing.assert_array_equal(client.call("m", X, pin=lease).output, 9 * X)
            with pytest.raises(NotFound, match="'m'"):
                client.call("m", X)
            with pytest.raises(NotFound, match="'z'"):
                client.call("z", X, pin=lease)


@pytest.mark.parametrize("then", ["edited", "gone"])
def test_a_file_of_weights_that_is_edited_or_gone_changes_nothing_that_was_not_named(tmp_path: Path, then: str) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"weight": torch.eye(3) * 7})
    dense = Expert("torch.nn:Linear", args=(3, 3), kwargs={"bias": False}, weights=path)
    with running(tmp_path, Layer("l", gate(2), {"a": dense, "b": expert(3)}, input=ROWS)) as (cluster, client):
        versions = cluster.status()["versions"]
        path.unlink()
        if then == "edited":
            save_tensors(path, {"weight": torch.eye(3) * 50})
        cluster.add_expert("l/c", expert(5), gate=gate(3))
        np.testing.assert_array_equal(client.forward("l", X), (7 + 2 * 3 + 3 * 5) * X)
        cluster.add_layer(Layer("m", gate(1), {"x": expert(9)}, input=ROWS))
        cluster.replace("l/b", expert(4))
        cluster.scale("l/a", 2)
        np.testing.assert_array_equal(client.forward("l", X), (7 + 2 * 4 + 3 * 5) * X)
        assert cluster.status()["versions"]["l/a"] == versions["l/a"]


def test_layers_come_and_go(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        other = Layer("m", gate(1), {"x": expert(9)}, shared={"s": expert(1)}, input=ROWS, on_missing="renormalize")
        cluster.add_layer(other)
        np.testing.assert_array_equal(client.forward("m", X), 10 * X)
        assert client.status()["layers"]["m"]["on_missing"] == "renormalize"
        cluster.remove_layer("m")
        with pytest.raises(NotFound, match="'m'"):
            client.call("m", X)
        np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3)) * X)
        eventually(lambda: replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"], 10, "its replicas are ended")
        assert not {id for id in cluster.status()["versions"] if id.startswith("m/")}
        with pytest.raises(InvalidRequest, match="a cluster needs a layer"):
            cluster.remove_layer("l")


def test_several_edits_are_one_epoch(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        before = cluster.status()["epoch"]
        edits = {
            "l": LayerEdit(experts={"d": expert(7)}, remove=("a",), order=("d", "b", "c"), gate=gate(3)),
            "m": LayerEdit.of(Layer("m", gate(1), {"x": expert(9)}, input=ROWS)),
        }
        outcome = cluster._carry_out(LayersRequest(change_id="1", layers=edits))
        assert outcome["epoch"] == before + 1
        np.testing.assert_array_equal(client.forward("l", X), (1 * 7 + 2 * 3 + 3 * 5) * X)
        np.testing.assert_array_equal(client.forward("m", X), 9 * X)


class Breaks:
    """A factory whose expert does not work."""

    def __call__(self, rows: Any) -> Any:
        raise ValueError("on purpose")


@pytest.mark.parametrize(
    ("made", "with_gate", "kind", "message"),
    [
        (expert(7), None, InvalidRequest, "picks among 3 experts, and there will be 4"),
        (expert(7), gate(5), InvalidRequest, "picks among 5 experts, but the layer has 4"),
        (Expert("nowhere:nothing"), gate(4), ExpertMeshError, "nowhere"),
        (Expert.from_function(Breaks()), gate(4), ExpertMeshError, "on purpose"),
    ],
)
def test_what_cannot_serve_changes_nothing(
    tmp_path: Path, made: Expert, with_gate: gates.Fixed | None, kind: type[ExpertMeshError], message: str
) -> None:
    with running(tmp_path) as (cluster, client):
        before = cluster.status()
        with pytest.raises(kind, match=message):
            cluster.add_expert("l/d", made, gate=with_gate)
        after = cluster.status()
        for kept in ("epoch", "versions"):
            assert after[kept] == before[kept]
        assert replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"]
        np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3)) * X)
        cluster.add_expert("l/d", expert(7), gate=gate(4))  # and the next one does


def test_what_was_changed_outlives_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        cluster.add_expert("l/d", expert(7, num_cpus=0.5, replicas=2), gate=gate(4))
        cluster.remove_expert("l/a", gate=gate(3, 5))
        cluster.add_layer(Layer("m", gate(1), {"x": expert(9)}, input=ROWS))
        versions, answer = cluster.status()["versions"], client.forward("l", X)
        np.testing.assert_array_equal(answer, (5 * 3 + 6 * 5 + 7 * 7) * X)
    said: list[str] = []
    with running(tmp_path, progress=said.append) as (cluster, client):
        assert cluster.status()["versions"] == versions
        np.testing.assert_array_equal(client.forward("l", X), answer)
        np.testing.assert_array_equal(client.forward("m", X), 9 * X)
        assert replicas(cluster) == ["l/b#0", "l/c#0", "l/d#0", "l/d#1", "m/x#0"]
        assert "layer l serves as it was changed; redeclare l/layer to have what is declared" in said
        assert "layer m serves as it was added; redeclare m/layer to have what is declared" in said
        cluster.replace("l/d", expert(8))  # and what was resumed can be changed
        cluster.remove_layer("m")
    said.clear()
    with running(tmp_path, layer(THREE), Layer("m", gate(1), {"x": expert(9)}), progress=said.append) as (
        cluster,
        client,
    ):
        np.testing.assert_array_equal(client.forward("l", X), (5 * 3 + 6 * 5 + 7 * 8) * X)
        assert "layer m was removed and stays away; redeclare m/layer to have it" in said
        assert [*client.status()["layers"]] == ["l"]
    with running(tmp_path, redeclare=["l/layer"]) as (cluster, client):
        np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3)) * X)
        assert replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"]


def test_a_layer_that_was_removed_can_be_redeclared(tmp_path: Path) -> None:
    both = [layer(THREE), Layer("m", gate(1), {"x": expert(9)}, input=ROWS)]
    with running(tmp_path, *both) as (cluster, _):
        cluster.remove_layer("m")
    with running(tmp_path, *both, redeclare=["m/layer"]) as (_, client):
        np.testing.assert_array_equal(client.forward("m", X), 9 * X)
    with running(tmp_path, *both) as (_, client):
        np.testing.assert_array_equal(client.forward("m", X), 9 * X)


def test_live_experts_last_until_the_cluster_stops_and_then_it_is_as_declared(tmp_path: Path) -> None:
    said: list[str] = []
    with running(tmp_path) as (cluster, client):
        cluster.add_expert("l/d", Expert.from_function(lambda rows: rows * 7), gate=gate(4))
        np.testing.assert_array_equal(client.forward("l", X), (2 + 6 + 15 + 28) * X)
    for _ in range(2):
        with running(tmp_path, progress=said.append) as (_, client):
            np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3)) * X)
    assert "layer l was changed with live objects, which no file can bring back: it is as declared" in said


def test_a_gate_goes_with_its_layer_where_both_were_changed(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, _):
        cluster.remove_expert("l/a", gate=gate(2))
    with (
        pytest.raises(FailedPrecondition, match="changed together with l/gate: name l/layer, for both"),
        running(tmp_path, redeclare=["l/gate"]),
    ):
        pass


def test_an_unknown_id_to_redeclare_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no expert or gate 'l/z'"), running(tmp_path, redeclare=["l/z"]):
        pass


def test_a_gate_for_other_experts_cannot_come_back(tmp_path: Path) -> None:
    with running(tmp_path) as (cluster, client):
        first = cluster.status()["versions"]["l/gate"]
        epoch = cluster.status()["epoch"]
        cluster.remove_expert("l/c", gate=gate(2))
        with pytest.raises(FailedPrecondition, match="picks among 3 experts, but the layer has 2"):
            client.swap({"l/gate": {"version": first}})
        with pytest.raises(FailedPrecondition, match=f"epoch {epoch} cannot be served any more: l/c was removed"):
            client.call("l", X, epoch=epoch)
        with pytest.raises(InvalidRequest, match="l/layer is what a layer is made of"):
            client.swap({"l/layer": {"version": client.history("l/layer")[0]["version"]}})
        np.testing.assert_array_equal(client.forward("l", X), (2 + 6) * X)


def test_a_controller_that_does_not_answer_is_told_again_until_it_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the commit and after it: the change is made, once, and the answer says so."""
    with running(tmp_path) as (cluster, client):
        real = Controller.declare
        for number, commits in enumerate([False, True]):
            calls: list[bool] = []

            async def declare(self: Controller, *asked: Any, commits: bool = commits, calls: Any = calls) -> Any:
                calls.append(True)
                found = await real(self, *asked) if commits or len(calls) > 1 else None
                if len(calls) == 1:
                    raise Unavailable("the controller was lost on purpose")
                return found

            monkeypatch.setattr(Controller, "declare", declare)
            outcome = cluster.add_expert(f"l/d{number}", expert(7), gate=gate(4 + number))
            monkeypatch.setattr(Controller, "declare", real)
            assert len(calls) == 2
            assert f"d{number}" in outcome["layers"]["l"]["after"]
        np.testing.assert_array_equal(client.forward("l", X), (2 + 6 + 15 + 28 + 35) * X)


def test_a_controller_that_is_lost_for_long_leaves_the_old_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as (cluster, client):
        real = Controller.declare

        async def declare(self: Controller, desired: Any, timeout: float) -> Any:
            if "d" in desired.layers["l"].experts:
                raise Unavailable("the controller was lost on purpose")
            return await real(self, desired, timeout)

        monkeypatch.setattr(Controller, "declare", declare)
        with pytest.raises(Unavailable, match="lost on purpose"):
            cluster.add_expert("l/d", expert(7), gate=gate(4), timeout=0.5)
        np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3)) * X)
        assert replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"]


def test_a_change_that_is_committed_while_it_is_taken_back_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller was slow: it still carries the change out when it is told to go back."""
    with running(tmp_path) as (cluster, client):
        real, told = Controller.declare, list[Any]()

        async def declare(self: Controller, desired: Any, timeout: float) -> Any:
            told.append(desired)
            if len(told) == 1:
                await asyncio.sleep(timeout)
                raise Unavailable("the controller was slow on purpose")
            if len(told) == 2:
                assert "d" not in desired.layers["l"].experts
                await real(self, told[0], 30.0)
            return await real(self, desired, timeout)

        monkeypatch.setattr(Controller, "declare", declare)
        outcome = cluster.add_expert("l/d", expert(7), gate=gate(4), timeout=0.5)
        assert outcome["layers"]["l"]["after"] == ["a", "b", "c", "d"]
        np.testing.assert_array_equal(client.forward("l", X), (2 + 6 + 15 + 28) * X)
        assert replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0", "l/d#0"]
        assert [item["version"][:3] for item in client.history("l/d")] == ["v1-"]


def test_a_change_that_is_refused_is_not_taken_for_durable_because_a_gate_was_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as (cluster, client):
        gate(3, 5).save(tmp_path / "gate.safetensors")
        real = Controller.declare

        async def declare(self: Controller, desired: Any, timeout: float) -> Any:
            if "d" not in desired.layers["l"].experts:
                return await real(self, desired, timeout)
            await asyncio.to_thread(client.swap, {"l/gate": tmp_path / "gate.safetensors"})
            raise FailedPrecondition("refused on purpose")

        monkeypatch.setattr(Controller, "declare", declare)
        with pytest.raises(FailedPrecondition, match="on purpose"):
            cluster.add_expert("l/d", expert(7), gate=gate(4))
        assert replicas(cluster) == ["l/a#0", "l/b#0", "l/c#0"]
        np.testing.assert_array_equal(client.forward("l", X), total(THREE, gate(3, 5)) * X)
