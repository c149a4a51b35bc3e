"""hivemind, in an environment of its own: one of its FFN experts, and its mixture of experts, in fp32.

It is no arm: server and client run in that environment, and the client measures, one block when it is asked. The server
computes in one process with all cores; the client's torch has one thread.

Its pins are not ours, so the environment is made once, in a cache folder. The wheel needs no compiler: what hivemind
wants for building (grpcio-tools) is not used when it runs. Packages that are installed here already, torch above all,
are seen through a path file and not installed again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack, closing
from pathlib import Path

from .arm import ArmUnavailable
from .helper import Helper

VERSION = "1.1.12"
LIGHT = (
    "prefetch_generator", "configargparse", "py-multihash", "varint", "base58", "netaddr", "py-cid", "uvloop", "scipy",
    "cryptography", "msgpack", "sortedcontainers", "pydantic", "protobuf>=5.29", "pyyaml", "packaging", "idna",
)  # fmt: skip
INSTALL_SECONDS = 600.0


class Hivemind:
    """A running server of `experts` experts, and a client; close it.

    Raises ArmUnavailable, with the reason, where hivemind cannot be installed or started here.
    """

    def __init__(self, *, experts: int = 8, width: int = 1024) -> None:
        interpreter, cores = python(), os.cpu_count() or 1
        with ExitStack() as started:

            def helper(module: str, threads: int, *arguments: object) -> Helper:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HIVEMIND_LOGLEVEL": "ERROR"}
                made = Helper(f"{__package__}.{module}", *arguments, python=interpreter, environment=environment)
                return started.enter_context(closing(made))

            server = helper("hivemind_server", cores, experts, width, cores)
            self._client = helper("hivemind_client", 1, server.said, experts, width)
            self._ends = started.pop_all()

    def block(self, what: str, rows: int, in_flight: int, seconds: float) -> dict[str, float]:
        """What the client saw over about so many seconds: `p50` in seconds, `rows_per_second`.

        `what` is "expert", "layer", or "training", which is a forward and a backward pass of the layer; the rate is the
        better one of one call and of `in_flight` at a time. Raises ArmUnavailable where the client has ended.
        """
        asked = {"what": what, "rows": rows, "in_flight": in_flight, "seconds": seconds}
        found: dict[str, float] | None = self._client.ask(asked)
        if found is None:
            raise ArmUnavailable("the client of hivemind ended before it had measured everything")
        return found

    def close(self) -> None:
        """End both processes."""
        self._ends.close()


def folder() -> Path:
    """Where the environment is, or would be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "expertmesh-peers" / f"hivemind-{VERSION}-py{sys.version_info.major}{sys.version_info.minor}"


def exists() -> bool:
    """Whether it has been made, to the end."""
    return (folder() / "ready").exists()


def python() -> str:
    """The interpreter of the environment, which is made if need be. Raises ArmUnavailable where that fails."""
    interpreter = folder() / "bin" / "python"
    if exists():
        return str(interpreter)
    try:
        venv.create(folder(), clear=True, with_pip=True)
        paths = {"base": str(folder()), "platbase": str(folder())}
        packages = Path(sysconfig.get_path("purelib", vars=paths))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        _pip(interpreter, "--no-deps", f"hivemind=={VERSION}")
        _pip(interpreter, *LIGHT)
        _run([str(interpreter), "-c", "import hivemind"])
    except (OSError, subprocess.SubprocessError) as error:
        words = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise ArmUnavailable(f"hivemind {VERSION} cannot be installed: {words[-1] if words else error}") from error
    (folder() / "ready").touch()
    return str(interpreter)


def _pip(interpreter: Path, *packages: str) -> None:
    _run([str(interpreter), "-m", "pip", "install", "--quiet", *packages])


def _run(command: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS, env=clean)
