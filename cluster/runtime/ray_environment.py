"""What comes before Ray: the environment that it reads on import, and whether one is reached. Does not import Ray."""

from __future__ import annotations

import importlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from pathlib import Path
from typing import Any, TypeVar

from ...experts.errors import FailedPrecondition
from ..machine.run_files import home

T = TypeVar("T")
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_timeout_ms_task_wait_for_death_info": "20",  # a killed actor is reported after 0.4 s instead of 1.4 s
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 would put all other processes of the machine first
}
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # a Ray of this machine alone: all its ports on loopback


def load_backend(address: str | None) -> Any:
    """Set the environment, then import the module `ray_backend`.

    A private Ray listens on loopback, and requires a token on every call, from a file that only this user can read. A
    joined Ray keeps its own settings. Raises FailedPrecondition if Ray was imported too early to enable tokens.
    """
    _set_defaults()
    if address is None:
        if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
            raise FailedPrecondition(
                "ray was imported before the cluster was started, too early to enable its authentication: import ray "
                'after Cluster.start, or set RAY_AUTH_MODE=token before, or join your Ray with address="auto"'
            )
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.update(_PRIVATE)
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_token_file()))
    return importlib.import_module(".ray_backend", __package__)  # here, because importing Ray reads the environment


def load_attach(token_path: str | None) -> Any:
    """Set the environment, then import the module `ray_attach`, for a Ray whose token is in a file, or any if None.

    Raises FailedPrecondition if Ray was imported too early to present the token.
    """
    _set_defaults()
    if token_path is not None:
        if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
            raise FailedPrecondition(
                "ray was imported before attach, too early to present the token of the cluster's Ray: import ray after "
                f"it, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH={token_path} before"
            )
        os.environ.update(_PRIVATE, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token_path)
    return importlib.import_module(".ray_attach", __package__)  # as above


def _set_defaults() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def _token_file() -> Path:
    path = home() / "ray.token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return path
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


def reachable(address: str, timeout: float) -> tuple[str, int]:
    """Host and port of a Ray cluster's address, once it accepts a connection.

    Ray itself tries for many minutes. Raises FailedPrecondition.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise FailedPrecondition(f'address {address!r} must be "auto", or host:port of the head of a Ray cluster')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as error:
        reason = f"no answer within {timeout:.0f} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise FailedPrecondition(
            f"address {address!r}: there is no Ray at {host}:{port} ({reason}); set it to the head of a running Ray "
            "cluster, or leave it out to start a private one"
        ) from None
    return host, int(port)


def within(seconds: float, action: Callable[[], T]) -> T:
    """Run an action of Ray that knows no time limit, in a thread that is left behind when `seconds` are over.

    Raises what the action raises, and FailedPrecondition when it takes longer.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # noqa: BLE001 (raised below, in the caller's thread)
            outcome.set_exception(error)

    threading.Thread(target=run, name="expertmesh-ray", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TookTooLong:
        raise FailedPrecondition(f"Ray did not answer within {seconds:.0f} s: is `address` the head of one?") from None
