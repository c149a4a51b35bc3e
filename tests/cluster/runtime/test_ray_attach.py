"""Joining a Ray for a router of this process: one Ray a process, and one controller of a name."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.cluster.runtime import ray_environment
from expertmesh.cluster.runtime.ray_environment import load_attach, load_backend
from expertmesh.cluster.runtime.router_process import Welcome
from expertmesh.experts.errors import FailedPrecondition, NotFound

pytestmark = pytest.mark.ray
ADDRESS = "10.0.0.7:6379"


class Controller:
    """An actor that says what an attached router has to know."""

    class welcome:
        @staticmethod
        def remote() -> Welcome:
            return Welcome(settings=None, channel=None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ray_attach() -> Any:
    load_backend(None)  # as a private Ray would have it: with its token, before Ray is imported
    return load_attach(None)


@pytest.fixture
def used(ray_attach: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A process that uses the Ray at ADDRESS; the named actors there."""
    ray = ray_attach.ray
    named: list[dict[str, str]] = []

    def get_actor(name: str, namespace: str) -> Any:
        if {"name": name, "namespace": namespace} not in named:
            raise ValueError(name)
        return Controller

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=ADDRESS, get_node_id=str))
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("it is not ours to leave"))
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray_attach, "fetched", lambda welcome, timeout: welcome)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: named)
    return named


def actor(name: str, namespace: str = "expertmesh") -> dict[str, str]:
    return {"name": name, "namespace": namespace}


def test_a_process_that_uses_another_ray_is_told_so(ray_attach: Any, used: list[dict[str, str]]) -> None:
    with pytest.raises(FailedPrecondition, match=rf"uses the Ray at {ADDRESS}, .* on that at 10.0.0.8:1: attach from"):
        ray_attach.connect("attached-1", "10.0.0.8:1", "news", None, 5.0)


def test_a_ray_that_is_used_already_is_used_and_left_alone(ray_attach: Any, used: list[dict[str, str]]) -> None:
    used.append(actor("news/1f"))
    connection = ray_attach.connect("attached-1", ADDRESS, "news", "news/1f", 5.0)
    assert connection.name == "attached-1"
    connection.close()
    connection.close()


def test_a_controller_is_found_by_the_name_of_its_cluster(ray_attach: Any, used: list[dict[str, str]]) -> None:
    used += [actor("news/1f"), actor("news/old", "theirs"), actor("old/news", "theirs"), actor("newspaper/2f")]
    assert ray_attach.connect("attached-1", ADDRESS, "news", None, 5.0).name == "attached-1"
    with pytest.raises(NotFound, match="runs no cluster 'sports'"):
        ray_attach.connect("attached-1", ADDRESS, "sports", None, 5.0)
    with pytest.raises(FailedPrecondition, match="runs news/1f, newspaper/2f: pass name="):
        ray_attach.connect("attached-1", ADDRESS, None, None, 5.0)
    used += [actor("news/3f")]
    with pytest.raises(FailedPrecondition, match="runs news/1f, news/3f"):
        ray_attach.connect("attached-1", ADDRESS, "news", None, 5.0)


def test_there_may_be_no_cluster_at_all(ray_attach: Any, used: list[dict[str, str]]) -> None:
    with pytest.raises(NotFound, match="runs no cluster"):
        ray_attach.connect("attached-1", ADDRESS, None, None, 5.0)
    with pytest.raises(NotFound, match="runs no cluster 'news'"):
        ray_attach.connect("attached-1", ADDRESS, "news", "news/ended", 5.0)


def test_the_token_of_a_private_ray_is_presented(ray_attach: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
    with pytest.raises(FailedPrecondition, match=r"RAY_AUTH_TOKEN_PATH=/t/ray\.token before"):
        ray_environment.load_attach("/t/ray.token")
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == ""
    monkeypatch.delitem(sys.modules, "ray")
    assert ray_environment.load_attach("/t/ray.token") is ray_attach
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", "/t/ray.token")
