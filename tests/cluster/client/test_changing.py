"""A client adds and removes experts and layers of a cluster in this process; what it asks wrongly changes nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.changing_layer import X, gate, layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh import AsyncClient, Client, Cluster, gates
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.changes import LayersAsked
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import (
    DataLoss,
    ExpertMeshError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SpecMismatch,
)
from expertmesh.experts.protocol import from_mapping
from expertmesh.experts.weights.files import save_tensors

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]
NAME = "changing"
TIMES_7: dict[str, Any] = {"factory": "numpy:poly1d", "args": ([7.0, 0.0],), "framework": "numpy"}


@pytest.fixture
def cluster(own_home: None, tmp_path: Path) -> Iterator[Cluster]:
    factories = ("numpy:poly1d", "torch.nn:Linear", "nowhere:nothing")
    options: dict[str, Any] = {"transport": "local", "port": 0, "name": NAME, "allowed_factories": factories}
    with Cluster.start([layer({"a": 2, "b": 3})], state_dir=tmp_path / "state", **options) as started:
        yield started


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(name=NAME) as client:
        yield client


def uploads(folder: Path) -> list[str]:
    return os.listdir(folder / "state" / "uploads")


def test_an_expert_comes_with_its_weights_and_gate_and_goes(client: Client, tmp_path: Path) -> None:
    path, told = tmp_path / "w.safetensors", dict[str, bool]()
    save_tensors(path, {"weight": torch.full((3, 3), 2.0)})
    outcome = client.add_expert(
        "l/c",
        "torch.nn:Linear",
        args=(3, 3),
        kwargs={"bias": False},
        weights=path,
        replicas=2,
        gate=gate(3),
        progress=lambda id, sent, total: told.update({id: sent == total}),
    )
    assert outcome["layers"] == {"l": {"before": ["a", "b"], "after": ["a", "b", "c"]}}
    assert told == {"l/c": True, "l/gate": True}
    reply = client.call("l", X)
    np.testing.assert_array_equal(reply.output, (2 + 2 * 3) * X + 3 * 2 * X.sum())
    assert reply.epoch == outcome["epoch"]
    assert outcome["versions"] == {id: reply.versions[id] for id in ("l/c", "l/gate")}
    gates.Fixed([5.0, 6.0]).save(tmp_path / "gate.safetensors")
    client.remove_expert("l/c", gate=tmp_path / "gate.safetensors")
    np.testing.assert_array_equal(client.forward("l", X), (5 * 2 + 6 * 3) * X)
    assert uploads(tmp_path) == []


def test_a_shared_expert_and_a_layer_come_and_go(client: Client) -> None:
    client.add_expert("l/s", shared=True, **TIMES_7)
    np.testing.assert_array_equal(client.forward("l", X), (2 + 6 + 7) * X)
    client.remove_expert("l/s")
    made = {"x": TIMES_7, "y": TIMES_7 | {"pack": "p"}}
    client.add_layer("m", made, gate(2), input=([3], "float32"), on_missing="renormalize", max_lost_mass=0.25)
    assert client.status()["layers"]["m"]["on_missing"] == "renormalize"
    np.testing.assert_array_equal(client.forward("m", X), 21 * X)
    client.remove_layer("m")
    with pytest.raises(NotFound):
        client.forward("m", X)


def test_a_coroutine_does_the_same(cluster: Cluster) -> None:
    async def story() -> None:
        async with AsyncClient(name=NAME) as client:
            await client.add_expert("l/c", gate=gate(3), **TIMES_7)
            np.testing.assert_array_equal(await client.forward("l", X), (2 + 6 + 21) * X)

    asyncio.run(story())


def test_the_same_change_id_gives_the_same_outcome(client: Client) -> None:
    first = client.add_expert("l/c", gate=gate(3), change_id="once", **TIMES_7)
    assert client.add_expert("l/c", gate=gate(3), change_id="once", **TIMES_7) == first
    with pytest.raises(InvalidRequest, match="has an expert 'c' already"):
        client.add_expert("l/c", gate=gate(3), **TIMES_7)


def test_it_needs_an_admin_and_a_factory_that_is_allowed(cluster: Cluster, client: Client, tmp_path: Path) -> None:
    with Client(cluster.endpoint, token=read_token(token_path(NAME), Role.OPERATOR)) as operator:
        with pytest.raises(PermissionDenied):
            operator.add_expert("l/c", gate=gate(3), **TIMES_7)
        with pytest.raises(PermissionDenied):
            operator.remove_layer("l")
    before = uploads(tmp_path)  # of the operator, who may upload; they are dropped with time
    with pytest.raises(PermissionDenied, match=r"l/c: 'numpy:sin' is not in allowed_factories"):
        client.add_expert("l/c", "numpy:sin", gate=gate(3))
    sneaky = gates.Custom("torch.nn:Flatten", num_experts=3, k=1)
    with pytest.raises(PermissionDenied, match=r"'torch.nn:Flatten' is not in allowed_factories"):
        client.add_expert("l/c", gate=sneaky, **TIMES_7)
    assert uploads(tmp_path) == before


@pytest.mark.parametrize(
    ("expert", "kind", "message"),
    [
        ({"gate": gate(2)}, InvalidRequest, "picks among 2 experts, but the layer has 3"),
        ({}, InvalidRequest, "give its new gate with the change"),
        ({"gate": "nowhere.safetensors"}, NotFound, "nowhere.safetensors"),
        ({"gate": gate(3), "args": "abc"}, InvalidRequest, "field args has the wrong type"),
        ({"gate": gate(3), "replicas": 0}, InvalidRequest, "replicas must be from 1"),
        ({"gate": gate(3), "num_gpus": 1.5}, InvalidRequest, "l/c: num_gpus above 1 must be whole"),
        ({"gate": gate(3), "autoscale": {"max": 0}}, InvalidRequest, "l/c: autoscale: max must be"),
        ({"gate": gate(3), "autoscale": {"most": 2}}, InvalidRequest, "l/c: unknown field 'most'"),
        ({"gate": gate(3), "input": ([5], "float32")}, SpecMismatch, "l/c"),
        ({"gate": gate(3), "input": "float32"}, InvalidRequest, r"rows are declared as \(shape, dtype\)"),
        ({"gate": gate(3), "colour": "red"}, InvalidRequest, "l/c: unknown field 'colour'"),
        ({"gate": gate(3), "factory": "nowhere:nothing"}, ExpertMeshError, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(
    client: Client, tmp_path: Path, expert: dict[str, Any], kind: type[ExpertMeshError], message: str
) -> None:
    before = client.status()
    with pytest.raises(kind, match=message):
        client.add_expert("l/c", **{**TIMES_7, **expert})
    after = client.status()
    assert (after["epoch"], [*after["layers"]["l"]["experts"]]) == (before["epoch"], ["l/a", "l/b"])
    np.testing.assert_array_equal(client.forward("l", X), (2 + 6) * X)
    assert uploads(tmp_path) == []


def test_weights_that_do_not_fit_are_refused(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"weight": torch.zeros(2, 2)})
    made: dict[str, Any] = {"args": (3, 3), "kwargs": {"bias": False}, "weights": path, "gate": gate(3)}
    with pytest.raises(ExpertMeshError, match="weight"):
        client.add_expert("l/c", "torch.nn:Linear", **made)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(DataLoss):
        client.add_expert("l/c", "torch.nn:Linear", **made)
    assert uploads(tmp_path) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["kind", "experts", "shared", "remove", "order", "gate", "settings", "autoscale", "x"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, VALUES | st.dictionaries(st.text(max_size=4), VALUES, max_size=2), max_size=4))
def test_a_layer_of_a_change_is_read_or_refused(edit: Mapping[str, Any]) -> None:
    with suppress(InvalidRequest):
        from_mapping(LayersAsked, {"change_id": "c", "layers": {"l": edit}}).read()
