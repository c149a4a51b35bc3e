"""The Ray backend: start or join Ray, start actors, and stop without leftovers."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from ...experts.errors import ConfigError, FailedPrecondition, Unavailable
from ...router.fanout.replica_view import Replica
from ..channel.run_folder import folder_of
from ..channel.settings import ChannelSettings
from ..control.messages import Desired
from ..control.ports import ControllerState, StateSettings
from ..placement.capacity import Resources
from ..placement.plan import PlannedReplica
from .ray_actors import ControllerActor, ExpertActor, LogSettings, RouterActor
from .ray_ports import fetched, last_lines, nodes
from .ray_reaper import MARKER, end_marked_processes, start_reaper
from .router_process import ServiceSettings

log = logging.getLogger(__name__)
MINIMUM_RAY = (2, 56)
CALL_TIMEOUT = 10.0
GROUPS = {"compute": 1, "stage": 1, "control": 2}
ALWAYS_RESTART = {"max_restarts": -1, "max_task_retries": 0}


class RayBackend:
    """Runs a cluster's processes as Ray actors owned by this process, which die with it."""

    def __init__(
        self,
        log_level: str,
        log_path: str,
        runtime_env: Mapping[str, Any] | None = None,
        *,
        direct: bool = True,
        hang_seconds: float = 60.0,
    ) -> None:
        """Rows travel over the direct channel, or over Ray's calls if not `direct`."""
        self._hang_seconds = hang_seconds
        self._logs = LogSettings(log_level, log_path)
        self._runtime_env = dict(runtime_env or {})
        self._replicas: dict[str, Any] = {}
        self._router: Any = None
        self._controller: Any = None
        self._started_ray = False
        self._reaper: subprocess.Popen[bytes] | None = None
        self._direct = direct
        self._channel: ChannelSettings | None = None
        self.temp_dir: str | None = None

    def start(self, address: str | None) -> None:
        """Start a private Ray, or join the one at `address`. Raises FailedPrecondition or ConfigError."""
        version = tuple(int(part) for part in ray.__version__.split(".")[:2])
        if version < MINIMUM_RAY:
            raise ConfigError(f"Ray {ray.__version__} has known vulnerabilities: install ray>=2.56")
        if ray.is_initialized() and address is None:
            raise FailedPrecondition('this process already uses Ray: pass address="auto" to run the cluster on it')
        if not ray.is_initialized():
            self._start_ray(address)
        if self._direct:
            self._channel = ChannelSettings(
                secret=secrets.token_bytes(32),
                run=secrets.token_hex(6),
                router_node=ray.get_runtime_context().get_node_id(),
                folder=None if self.temp_dir is None else str(Path(self.temp_dir) / "channel"),
            )

    def _start_ray(self, address: str | None) -> None:
        options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        if address is None:
            self.temp_dir = tempfile.mkdtemp(prefix="expertmesh-")
            os.environ[MARKER] = self.temp_dir
            self._reaper = start_reaper(self.temp_dir)
            options |= {"address": "local", "_temp_dir": self.temp_dir}
        else:
            options["address"] = address
        self._started_ray = True
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **options)
        except (ConnectionError, RuntimeError) as error:
            raise FailedPrecondition(f"Ray could not be started or joined: {error}") from error

    def nodes(self) -> list[Resources]:
        """What each node of the Ray cluster has to reserve."""
        return nodes()

    def start_front(self, settings: ServiceSettings, state: StateSettings, timeout: float) -> tuple[int, int | None]:
        """Start router and controller on this node; returns the ports of gateway and metrics page."""
        options = {"num_cpus": 0, "max_concurrency": 1000, **self._here(), **ALWAYS_RESTART}
        self._router = ray.remote(RouterActor).options(**options).remote(settings, self._logs, self._channel)
        self._controller = ray.remote(ControllerActor).options(**options).remote(state, self._logs)
        ports: tuple[int, int | None] = fetched(self._router.start.remote(), timeout)
        return ports

    def start_replica(self, planned: PlannedReplica) -> None:
        """Start the actor of a replica, without waiting for it."""
        expert = planned.placement
        actor = ray.remote(concurrency_groups=GROUPS)(ExpertActor)  # type: ignore[call-overload]
        options: dict[str, Any] = {
            "num_cpus": expert.num_cpus or 0,
            "num_gpus": expert.num_gpus,
            "resources": dict(expert.resources),
            "scheduling_strategy": "SPREAD",
            **ALWAYS_RESTART,
        }
        environment = {**self._runtime_env, **(expert.runtime_env or {})}
        if environment:
            try:
                options["runtime_env"] = uploaded(environment)
            except (ValueError, OSError) as error:
                raise ConfigError(f"the runtime_env of {planned.id} cannot be used: {error}") from error
        device = "cuda" if expert.num_gpus else "cpu"
        settings = (planned.id, planned.expert_ids, device, self._logs, self._channel, self._hang_seconds)
        self._replicas[planned.id] = actor.options(**options).remote(*settings)

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """Wait until the actor of a replica runs. Raises Unavailable at `deadline` (monotonic seconds)."""
        timeout = max(0.1, deadline - time.monotonic())
        try:
            report: Replica = fetched(self._replicas[replica_id].report.remote(), timeout)
        except Unavailable as error:
            if said := self._environment_log():
                raise Unavailable(f"{error.message}; setting up its runtime_env said: {said}") from error
            raise
        return report

    def _environment_log(self) -> str:
        """The end of what setting up runtime environments last printed on this node, for a Ray of our own."""
        found = Path(self.temp_dir or os.devnull).glob("session_latest/logs/runtime_env_setup-*.log")
        logs = sorted(found, key=lambda path: path.stat().st_mtime)
        return last_lines(logs[-1].read_text(errors="replace")) if logs else ""

    def handles(self) -> dict[str, Any]:
        """The actor of each replica by id, for the transport."""
        return dict(self._replicas)

    def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Have the controller load the declared layers; returns the versions that then serve.

        Raises the controller's errors, ConfigError for a live object that cannot be sent, and Unavailable if the
        controller does not answer in time.
        """
        try:
            call = self._controller.declare.remote(self._controller, self._router, desired, timeout)
        except Exception as error:  # noqa: BLE001 (Ray pickles live objects here, whose code may raise anything)
            raise _unsendable(desired) or error from None
        versions: dict[str, str] = fetched(call, timeout + CALL_TIMEOUT)
        return versions

    def state(self) -> ControllerState:
        """The state of the controller."""
        state: ControllerState = fetched(self._controller.state.remote(), CALL_TIMEOUT)
        return state

    def stop(self, grace: float) -> None:
        """Drain the router, kill every actor, shut down Ray if it was started here, and remove its folder."""
        if self._router is not None and ray.is_initialized():
            _quietly(lambda: fetched(self._router.stop.remote(grace), grace + CALL_TIMEOUT))
        for actor in (self._controller, self._router, *self._replicas.values()):
            if actor is not None and ray.is_initialized():
                _quietly(lambda actor=actor: ray.kill(actor, no_restart=True))  # type: ignore[misc]
        self._replicas.clear()
        self._router = self._controller = None
        if self._started_ray:
            _quietly(ray.shutdown)
            self._started_ray = False
        if self._channel is not None:
            shutil.rmtree(folder_of(self._channel.run), ignore_errors=True)
        if self.temp_dir is not None:
            end_marked_processes(self.temp_dir)
            shutil.rmtree(self.temp_dir, ignore_errors=True)
            os.environ.pop(MARKER, None)
            self.temp_dir = None
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None

    def _here(self) -> dict[str, Any]:
        """Options that place an actor on this node, whose address clients use."""
        node_id = ray.get_runtime_context().get_node_id()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
        return {"scheduling_strategy": strategy}


def uploaded(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Upload the local folders of a runtime environment; returns it with their URIs.

    Ray does this only for the environment of a whole job; for a single actor this uses Ray's internal functions.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with_code = upload_working_dir_if_needed(dict(environment), True, scratch)
        answer: dict[str, Any] = upload_py_modules_if_needed(with_code, True, scratch)
    return answer


def _quietly(action: Callable[[], Any]) -> None:
    """Run one step of `stop`, and only log its errors, so that the next step runs."""
    try:
        action()
    except (Unavailable, RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
        log.debug("while stopping: %s", error)
    except Exception:
        log.exception("while stopping")


def _unsendable(desired: Desired) -> ConfigError | None:
    """The error for a live object that Ray cannot send to its replica, if there is one."""
    for layer in desired.layers.values():
        for id, expert in layer.everyone_by_id.items():
            try:
                ray.cloudpickle.dumps(expert.live)  # type: ignore[no-untyped-call]
            except Exception as error:  # noqa: BLE001 (as above)
                kind = type(expert.live).__name__
                return ConfigError(
                    f"{id}: the live {kind} cannot be sent to its replica: {error}. Declare it by "
                    'a factory, as in Expert("mine:make"); TorchScript by Expert("torch.jit:load", args=(path,))'
                )
    return None
