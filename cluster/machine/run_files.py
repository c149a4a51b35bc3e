"""The files of a cluster name on this machine: run file, token file, socket, and lock.

home()/run/<name>.json    endpoints, token file, process and temporary folder of the cluster with that name
home()/run/<name>.token   its tokens
home()/run/<name>.sock    the socket of its first router for clients of the same user
home()/run/<name>~1.sock  that of its second router, and so on
home()/run/<name>.state   versions and epochs of a cluster that keeps none for its next start; removed when it stops
home()/run/<name>.lock    held as long as the process of the cluster lives
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError, DataLoss, NotFound
from ...experts.names import is_name
from ...experts.protocol import from_mapping
from .durable_files import private_folder, write_private

DEFAULT_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The run file of a cluster of this user that is running, or has died without clean-up.

    `endpoints`, `sockets` and `metrics_endpoints` have an entry for each router, in the same order; `endpoint`,
    `socket` and `metrics_endpoint` are the first of each. A socket is "" where the router is on another machine;
    without metrics there are no `metrics_endpoints`. `started` is the start time of process `pid`; it tells a later
    process with the same id apart. On Ray, `ray_controller` is the name of the controller's actor, and a private Ray
    has its token in `ray_token_path`.
    """

    name: str
    endpoint: str
    token_path: str
    pid: int
    started: int
    version: str
    metrics_endpoint: str | None = None
    ray_temp_dir: str | None = None
    socket: str | None = None
    endpoints: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    metrics_endpoints: list[str] = field(default_factory=list)
    ray_address: str | None = None
    ray_token_path: str | None = None
    ray_controller: str | None = None

    def __post_init__(self) -> None:
        for many, one in (("endpoints", "endpoint"), ("sockets", "socket"), ("metrics_endpoints", "metrics_endpoint")):
            if not getattr(self, many) and getattr(self, one):  # an earlier version wrote of its only router
                object.__setattr__(self, many, [getattr(self, one)])

    @classmethod
    def of_this_process(cls, name: str, endpoint: str, version: str, **more: Any) -> RunFile:
        """The run file of a cluster that this process runs."""
        pid, tokens = os.getpid(), str(token_path(name))
        started = start_time(pid) or 0
        return cls(name=name, endpoint=endpoint, token_path=tokens, pid=pid, started=started, version=version, **more)

    @classmethod
    def read(cls, name: str) -> RunFile:
        """Read the run file of a name. Raises NotFound if there is none and DataLoss if it is damaged."""
        path = run_path(name)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
            return from_mapping(cls, known)  # a later version may add fields
        except FileNotFoundError:
            raise NotFound(f"you have no running cluster {name!r} on this machine") from None
        except (ValueError, TypeError):
            raise DataLoss(f"{path} is damaged: remove it, or start a cluster with that name") from None

    def write(self) -> None:
        """Write the run file atomically, readable by this user alone."""
        home()
        write_private(run_path(self.name), json.dumps(asdict(self), indent=1))

    def remove(self) -> None:
        """Remove the run file, the token file and the sockets when the cluster stops."""
        for path in (run_path(self.name), Path(self.token_path), *socket_paths(self.name)):
            path.unlink(missing_ok=True)

    def socket_of(self, endpoint: str) -> str | None:
        """The socket of the router at one of the endpoints, however it is written; None if it has none."""
        sockets = dict(zip(map(_address, self.endpoints), self.sockets, strict=False))
        return sockets.get(_address(endpoint)) or None

    def is_stale(self) -> bool:
        """Whether the process that wrote the file has ended."""
        return start_time(self.pid) != self.started


def home() -> Path:
    """The folder of this user's clusters, $EXPERTMESH_HOME or ~/.expertmesh; created with mode 0700 if missing.

    Raises ConfigError if it cannot be created, or if others could write into it.
    """
    folder = private_folder(_folder(), "EXPERTMESH_HOME")
    private_folder(folder / "run", "EXPERTMESH_HOME")
    return folder


def run_path(name: str) -> Path:
    """The run file of a cluster name. Raises ConfigError for an invalid name."""
    return _in_run(name, "json")


def token_path(name: str) -> Path:
    """The token file of a cluster name."""
    return _in_run(name, "token")


def socket_path(name: str, number: int = 0) -> Path:
    """The socket of a router of a cluster name: its first, or that of a higher `number`."""
    first = _in_run(name, "sock")
    return first if number == 0 else first.with_name(f"{name}~{number}.sock")  # no cluster has a name with ~


def socket_paths(name: str) -> list[Path]:
    """The sockets of all routers that a cluster of this name has, or has left."""
    first = socket_path(name)
    return [first, *sorted(first.parent.glob(f"{name}~*.sock"))]


def lock_path(name: str) -> Path:
    """The lock of a cluster name."""
    return _in_run(name, "lock")


def state_path(name: str) -> Path:
    """The default folder for the versions and epochs of a cluster name."""
    lock_path(name)
    return home() / "state" / name


def passing_state_path(name: str) -> Path:
    """The folder for the versions and epochs of a cluster name that keeps none for its next start."""
    return _in_run(name, "state")


def list_all() -> list[RunFile]:
    """All readable run files of this user, including stale ones, sorted by name."""
    run_files = []
    for path in sorted((_folder() / "run").glob("[!.]*.json")):
        try:
            run_files.append(RunFile.read(path.stem))
        except (NotFound, DataLoss, ConfigError):
            continue  # removed meanwhile, or not a run file; a start with that name clears it
    return run_files


def find(name: str | None = None) -> RunFile:
    """The running cluster with that name; without a name, the only one, or "default" if there are several.

    Raises a NotFound that lists the running clusters.
    """
    running = {run.name: run for run in list_all() if not run.is_stale()}
    if name is None and len(running) == 1:
        return next(iter(running.values()))
    wanted = DEFAULT_NAME if name is None else name
    if wanted in running:
        return running[wanted]
    if not running:
        which = "cluster" if name is None else f"cluster {name!r}"
        raise NotFound(
            f"you have no running {which} on this machine: start one with Cluster.start, or from a mesh.yaml"
        )
    which = "several running clusters" if name is None else f"no running cluster {name!r}"
    raise NotFound(f"you have {which} on this machine: choose with name= among {', '.join(sorted(running))}")


def find_endpoint(endpoint: str) -> RunFile | None:
    """This user's running cluster that has a router at `endpoint`, or None."""
    address = _address(endpoint)
    running = (run for run in list_all() if not run.is_stale())
    return next((run for run in running if address in map(_address, run.endpoints)), None)


def _folder() -> Path:
    variable = os.environ.get("EXPERTMESH_HOME")
    try:
        return Path(variable).absolute() if variable else Path.home() / ".expertmesh"
    except RuntimeError:
        raise ConfigError("this user has no home folder: set EXPERTMESH_HOME to a folder that you own") from None


def _in_run(name: str, suffix: str) -> Path:
    if not is_name(name):
        raise ConfigError(f"cluster name {name!r} must be 1 to 64 letters, digits, '_', '-' or '.'")
    return _folder() / "run" / f"{name}.{suffix}"


def _address(endpoint: str) -> tuple[str, str]:
    host, _, port = endpoint.rpartition("/")[2].rpartition(":")
    return "127.0.0.1" if host.lower() == "localhost" else host.lower(), port


def start_time(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; None if it does not exist or is a zombie.

    Without /proc, the result is 0 for every live process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _alive(pid)
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _alive(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
