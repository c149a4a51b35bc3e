"""An environment of its own for hivemind: its pins are not ours. Made once, in a cache folder.

The wheel needs no compiler: what hivemind wants for building (grpcio-tools) is not used when it runs. Packages that are
installed here already, torch above all, are seen through a path file and not installed again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from .arm import ArmUnavailable

VERSION = "1.1.12"
LIGHT = (
    "prefetch_generator", "configargparse", "py-multihash", "varint", "base58", "netaddr", "py-cid", "uvloop", "scipy",
    "cryptography", "msgpack", "sortedcontainers", "pydantic", "protobuf>=5.29", "pyyaml", "packaging", "idna",
)  # fmt: skip
INSTALL_SECONDS = 600.0


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
