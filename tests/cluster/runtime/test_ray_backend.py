"""How Ray is started, joined and asked, without a Ray: bounded, silent, and with nothing of the program changed."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.cluster.runtime.ray_environment import load_backend
from expertmesh.experts.errors import FailedPrecondition, Unavailable

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def backend() -> Any:
    """The module, imported as a private Ray would have it."""
    return load_backend(None)


def test_an_address_without_a_ray_is_told_at_once(backend: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address, reason in ((f"127.0.0.1:{port}", "refused"), ("nosuch.invalid:6379", "nosuch.invalid")):
        with pytest.raises(FailedPrecondition, match=reason) as caught:
            backend.reachable(address, 20.0)
        assert "set it to the head of a running Ray cluster" in caught.value.message


def test_what_ray_never_ends_is_left_behind(backend: Any) -> None:
    for_ever = threading.Event()
    with pytest.raises(FailedPrecondition, match="did not answer"):
        backend.within(0.05, for_ever.wait)
    for_ever.set()
    assert backend.within(20.0, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        backend.within(20.0, lambda: 1 / 0)


def test_what_ray_tells_is_logged_and_not_printed(
    backend: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.logging.getLogger("expertmesh"), "propagate", True)
    backend._logged({"lines": ["a worker was killed\nstate"], "pid": "raylet", "is_err": False}, False)
    assert capsys.readouterr().out == ""
    assert {record.getMessage() for record in caplog.records if record.levelname == "WARNING"} == {
        "Ray: a worker was killed"
    }


def test_no_call_starts_another_ray(backend: Any) -> None:
    asked: list[int] = []
    with pytest.raises(Unavailable, match=r"ray\.shutdown"):
        backend._asked(lambda: asked.append(1), 1.0)
    assert asked == []
    assert not backend.ray.is_initialized()
    assert "ray.shutdown() was called" in str(backend.RayBackend("info", "").lost())


@pytest.fixture
def handler_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_handler_of_the_program_stays(backend: Any, handler_as_before: None) -> None:
    def of_ray(*_: object) -> None: ...

    def of_the_program(*_: object) -> None: ...

    for own, after in ((of_the_program, of_the_program), (signal.SIG_IGN, signal.SIG_IGN), (signal.SIG_DFL, of_ray)):
        signal.signal(signal.SIGTERM, own)  # type: ignore[arg-type]
        with backend._same_sigterm_handler():
            signal.signal(signal.SIGTERM, of_ray)
        assert signal.getsignal(signal.SIGTERM) is after


def test_a_head_that_is_frozen_is_ended_before_anything_waits_for_it(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(backend, "end_marked_processes", lambda folder: order.append("processes end"))
    monkeypatch.setattr(backend.ray, "shutdown", lambda: order.append("shutdown"))
    monkeypatch.setattr(backend, "fetched", lambda *_: pytest.fail("an actor was asked"))
    running = backend.RayBackend("info", "")
    running._routers, running._started_ray, running.temp_dir = {"router-0": object()}, True, str(tmp_path / "ray")
    monkeypatch.setattr(backend, "FROZEN_SECONDS", 0.5)
    monkeypatch.setattr(backend.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(backend.ray._private.worker, "_global_node", SimpleNamespace(all_processes={}))
    monkeypatch.setattr(running, "_head_answers", lambda: False)
    running.stop(grace=5.0)
    assert order == ["processes end", "shutdown", "processes end"]


def test_a_head_that_is_late_leaves_calls_in_flight_their_grace(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(backend, "end_marked_processes", lambda folder: order.append("processes end"))
    monkeypatch.setattr(backend.ray, "shutdown", lambda: order.append("shutdown"))
    monkeypatch.setattr(backend.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(backend.ray, "kill", lambda *_, **__: order.append("a router ends"))
    monkeypatch.setattr(backend.ray, "wait", lambda asked, **_: order.append(" and ".join(asked)))
    monkeypatch.setattr(backend.ray._private.worker, "_global_node", SimpleNamespace(all_processes={}))
    running = backend.RayBackend("info", "")
    running._started_ray, running.temp_dir = True, str(tmp_path / "ray")
    for name in ("a", "b"):  # asked to drain before one of them is waited for
        stop = SimpleNamespace(remote=lambda grace, name=name: f"{name} drains")
        running._routers[name] = SimpleNamespace(stop=stop)
    asked = []

    def answers_late() -> bool:
        asked.append(1)
        if len(asked) > 2:
            running._head_answered = time.monotonic()
        return len(asked) > 2

    monkeypatch.setattr(running, "_head_answers", answers_late)
    running.stop(grace=5.0)
    assert order == ["a drains and b drains", "a router ends", "a router ends", "shutdown", "processes end"]


def test_a_ray_that_was_imported_early_is_on_loopback_too_and_as_before_afterwards(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, seen = backend.ray._private, []
    monkeypatch.setattr(private.ray_constants, "ENABLE_RAY_CLUSTER", True)  # as without our setting on import
    prints = private.worker.print_to_stdstream
    monkeypatch.setattr(backend, "start_reaper", lambda folder: None)
    monkeypatch.setattr(backend.ray, "init", lambda **options: seen.append(private.services.get_node_ip_address()))
    running = backend.RayBackend("info", "")
    try:
        running._start_ray()
        assert private.worker.print_to_stdstream is not prints
    finally:
        running.stop(0.0)
    assert seen == ["127.0.0.1"]
    assert private.ray_constants.ENABLE_RAY_CLUSTER  # what the program does with Ray afterwards is its own
    assert private.worker.print_to_stdstream is prints
