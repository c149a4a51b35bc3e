"""Scaling from a client and from the command line, against a cluster in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result
from helpers.swap_cluster import NAME, SwapCluster, swap_cluster

from expertmesh import AsyncClient, InvalidRequest, NotFound, PermissionDenied
from expertmesh.cluster.cli.main import cli
from expertmesh.cluster.rpc.methods import Role


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwapCluster]:
    with swap_cluster(tmp_path_factory.mktemp("scale")) as started:
        yield started


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["scale", *map(str, arguments), "--name", NAME], prog_name="expertmesh")


def numbers(running: SwapCluster) -> dict[str, int]:
    experts = running.client.status()["layers"]["l"]["experts"]
    return {id: len(expert["replicas"]) for id, expert in experts.items()}


def test_a_client_scales_one_or_several_and_a_repeated_change_changes_nothing(running: SwapCluster) -> None:
    before = running.client.status()["epoch"]
    first = running.client.scale("l/a", replicas=2, change_id="first")
    assert first == {"l/a": {"before": 1, "after": 2}}
    assert numbers(running) == {"l/a": 2, "l/b": 1, "l/c": 1}
    running.client.scale({"l/a": 1, "l/b": 2})
    assert running.client.scale("l/a", replicas=2, change_id="first") == first
    assert numbers(running) == {"l/a": 1, "l/b": 2, "l/c": 1}
    running.client.scale("l/b", 1)
    running.call()
    assert running.client.status()["epoch"] == before


def test_a_client_is_told_what_is_wrong(running: SwapCluster) -> None:
    with pytest.raises(NotFound, match="l/z"):
        running.client.scale("l/z", 2)
    for wrong in ({}, {"l/a": 0}, {"l/a": 1.5}):
        with pytest.raises(InvalidRequest):
            running.client.scale(wrong)
    with running.as_role(Role.READER) as reader, pytest.raises(PermissionDenied, match="operator"):
        reader.scale("l/a", 2)
    assert AsyncClient.scale.__doc__ == type(running.client).scale.__doc__


def test_the_command_prints_a_table_or_json(running: SwapCluster) -> None:
    result = run("l/a=2", "l/c=2")
    assert result.exit_code == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [["l/a", "1", "2"], ["l/c", "1", "2"]]
    assert "scaled in " in result.stdout
    result = run("l/a=1", "l/c=1", "-o", "json")
    assert json.loads(result.stdout) == {"l/a": {"before": 2, "after": 1}, "l/c": {"before": 2, "after": 1}}
    assert run("l/a=many").exit_code == 2
    assert run("l/a=0").exit_code == 1
    assert numbers(running) == {"l/a": 1, "l/b": 1, "l/c": 1}
