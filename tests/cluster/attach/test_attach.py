"""`attach` finds a cluster by its run file or by an address, and leaves nothing where that fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.attached import Home

import expertmesh
from expertmesh import Expert, Layer, errors, gates
from expertmesh.cluster.attach import attach as module
from expertmesh.cluster.control.routers.mailbox import Mailbox
from expertmesh.cluster.machine.run_files import RunFile

X = np.ones((2, 3), np.float32)


class Silent(Home):
    """A controller that takes members and tells them nothing."""

    async def bring_up(self, box: Mailbox) -> None:
        pass


class Ray:
    """In the place of the module that joins a Ray: notes how it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
        self.asked: list[Any] = []
        self.tokens: list[str | None] = []
        self.home = home
        monkeypatch.setattr(module, "load_attach", self.loaded)

    def loaded(self, token_path: str | None) -> Any:
        self.tokens.append(token_path)
        return SimpleNamespace(connect=self.connect)

    def connect(self, name: str, address: str, cluster: str | None, actor: str | None, timeout: float) -> Home:
        assert name.startswith("attached-")
        assert timeout > 0
        self.asked.append((address, cluster, actor))
        return self.home


def layer() -> Layer:
    return Layer("l", gates.Fixed([1.0]), {"e": Expert("torch:abs")})


def run_file(name: str, **more: Any) -> None:
    RunFile.of_this_process(name, "127.0.0.1:1", "0.1", **more).write()


def test_a_name_is_looked_up_in_the_run_file(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, Home(layer(), tmp_path))
    run_file("news", ray_address="127.0.0.1:6379", ray_controller="news/1f", ray_token_path="/t/ray.token")
    with expertmesh.attach("news", timeout=20.0) as router:
        np.testing.assert_array_equal(router.forward("l", X), X)
        assert isinstance(router, expertmesh.AttachedRouter)
    assert (ray.asked, ray.tokens) == ([("127.0.0.1:6379", "news", "news/1f")], ["/t/ray.token"])
    assert (ray.home.members, ray.home.closed) == ([], 1)


def test_an_address_needs_no_run_file(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, Home(layer(), tmp_path))
    expertmesh.attach("10.0.0.7:6379", name="news").close()
    assert (ray.asked, ray.tokens) == ([("10.0.0.7:6379", "news", None)], [None])


def test_what_cannot_be_attached_to_is_said(own_home: Path) -> None:
    with pytest.raises(errors.NotFound, match="'nosuch'"):
        expertmesh.attach("nosuch")
    run_file("alone")
    with pytest.raises(errors.FailedPrecondition, match=r"'alone' has no Ray .* Client"):
        expertmesh.attach()
    with pytest.raises(errors.InvalidRequest, match="timeout"):
        expertmesh.attach("alone", attach_timeout=-1)


def test_a_router_that_is_told_nothing_leaves_again(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(monkeypatch, Silent(layer(), tmp_path))
    with pytest.raises(errors.Unavailable, match="has not been told its layers"):
        expertmesh.attach("10.0.0.7:6379", attach_timeout=0.01)
    assert (ray.home.joined, ray.home.members, ray.home.closed) == (1, [], 1)


def test_the_defaults_of_calls_are_checked_before_anything_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, None)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest, match="timeout"):
        expertmesh.attach("10.0.0.7:6379", timeout=0)
    assert ray.asked == []
