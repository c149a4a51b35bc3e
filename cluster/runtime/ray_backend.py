"""The Ray backend: start or join Ray, start actors, and stop without leftovers."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from ..control.routers.mailbox import Letter
from ..machine.temp_folder import new_run_folder, run_folder_of
from ..placement.capacity import Resources
from ..placement.plan import PlannedReplica
from .places import Place
from .ray_actors import NAMESPACE, ControllerActor, ExpertActor, LogSettings, RouterActor
from .ray_environment import reachable, within
from .ray_ports import fetched, last_lines, nodes
from .ray_reaper import end_marked_processes, marked, start_reaper
from .router_process import ServiceSettings, Welcome

log = logging.getLogger(__name__)
MINIMUM_RAY = (2, 56)
CALL_TIMEOUT = 10.0
PING_SECONDS = 2.0
HEAD_SILENT_SECONDS = 30.0
"""How long Ray's head may not answer; after 60 s Ray would end this process."""

FROZEN_SECONDS = 10.0
"""How long the head may not answer before `stop` takes it for frozen."""

SHUTDOWN_SECONDS = 20.0
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
        spread: bool = False,
        hang_seconds: float = 60.0,
    ) -> None:
        """Rows travel over the direct channel, or over Ray's calls if not `direct`.

        Routers but the first are `spread` over the nodes, or are all on this one.
        """
        self._spread = spread
        self._hang_seconds = hang_seconds
        self._logs = LogSettings(log_level, log_path)
        self._runtime_env = dict(runtime_env or {})
        self._replicas: dict[str, Any] = {}
        self._routers: dict[str, Any] = {}
        self._controller: Any = None
        self._started_ray = False
        self._patched: list[tuple[Any, str, Any]] = []
        self._reaper: subprocess.Popen[bytes] | None = None
        self._direct = direct
        self._channel: ChannelSettings | None = None
        self._controller_name = ""
        self._head_answered = time.monotonic()
        self.temp_dir: str | None = None

    def start(self, address: str | None, timeout: float) -> None:
        """Start a private Ray, or join the one at `address` within `timeout` seconds.

        Raises FailedPrecondition or ConfigError.
        """
        version = tuple(int(part) for part in ray.__version__.split(".")[:2])
        if version < MINIMUM_RAY:
            raise ConfigError(f"Ray {ray.__version__} has known vulnerabilities: install ray>=2.56")
        if ray.is_initialized() and address is None:
            raise FailedPrecondition('this process already uses Ray: pass address="auto" to run the cluster on it')
        if not ray.is_initialized():
            try:
                if address is None:
                    self._start_ray()
                else:
                    self._join_ray(address, timeout)
            except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise FailedPrecondition(f"Ray could not be started or joined: {error}") from error
        self._head_answered = time.monotonic()
        if self._direct:
            self._channel = ChannelSettings(
                secret=secrets.token_bytes(32),
                run=secrets.token_hex(6),
                router_node=ray.get_runtime_context().get_node_id(),
                folder=None if self.temp_dir is None else str(Path(self.temp_dir) / "channel"),
                spread=self._spread or address is not None,  # who attaches may be on any node
            )

    def _start_ray(self) -> None:
        self.temp_dir = str(new_run_folder() / "ray")  # Ray lets every user into its folder, but not into that above
        self._reaper = start_reaper(self.temp_dir)
        self._started_ray = True
        self._patch(ray._private.worker, "print_to_stdstream", _logged)
        self._patch(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)  # as the environment says; read on import
        with marked(self.temp_dir), _same_sigterm_handler():
            ray.init(address="local", include_dashboard=False, _temp_dir=self.temp_dir, **QUIET)

    def _join_ray(self, address: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        host, port = reachable(ray._private.services.canonicalize_bootstrap_address(address) or address, timeout)
        self._started_ray = True
        self._patch(ray._private.worker, "print_to_stdstream", _logged)
        within(max(1.0, deadline - time.monotonic()), lambda: ray.init(address=f"{host}:{port}", **QUIET))

    def _patch(self, module: Any, name: str, value: Any) -> None:
        """Set a variable of Ray's until `stop`: what the program does with Ray later is its own."""
        self._patched.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def ray(self) -> dict[str, str]:
        """The address of the Ray, the token file of a private one, and the name of the controller's actor."""
        found = {"ray_address": ray.get_runtime_context().gcs_address, "ray_controller": self._controller_name}
        if self.temp_dir is not None:
            found["ray_token_path"] = os.environ["RAY_AUTH_TOKEN_PATH"]
        return found

    def lost(self) -> str | None:
        """Why the Ray of this cluster will not serve it any more, or None."""
        if not ray.is_initialized():
            return "ray.shutdown() was called in this process"
        worker: Any = ray._private.worker
        for name in ("gcs_server", "raylet"):  # of a private Ray
            for info in worker._global_node.all_processes.get(name, ()):
                if info.process.poll() is not None:
                    return f"{name} (pid {info.process.pid}), a process of its Ray, has ended"
        if not self._head_answers():
            silent = time.monotonic() - self._head_answered
            if silent > HEAD_SILENT_SECONDS:
                return f"the head of its Ray has not answered for {silent:.0f} s"
        return None

    def _is_lost(self) -> bool:
        """Whether Ray is lost, or its head is silent for several seconds: one that is late may only be busy."""
        began = time.monotonic()
        while self.lost() is None:
            if self._head_answered >= began:
                return False
            if time.monotonic() - began > FROZEN_SECONDS:
                return True
            time.sleep(0.1)
        return True

    def _head_answers(self) -> bool:
        worker: Any = ray._private.worker
        try:
            worker.global_worker.gcs_client.internal_kv_exists(b"expertmesh", namespace=None, timeout=PING_SECONDS)
        except ray.exceptions.RayError:
            return False
        self._head_answered = time.monotonic()
        return True

    def nodes(self) -> list[Resources]:
        """What each node of the Ray cluster has to reserve."""
        return nodes()

    def start_front(self, routers: Mapping[str, ServiceSettings], state: StateSettings, timeout: float) -> list[Place]:
        """Start the routers and the controller; returns where each router listens.

        Controller and first router are on this node, whose address clients use.
        """
        owners_node = ray.get_runtime_context().get_node_id()
        options = {"num_cpus": 0, "max_concurrency": 1000, **self._here(), **ALWAYS_RESTART}
        for name, settings in routers.items():
            first = not self._routers
            places = options if first or not self._spread else {**options, "scheduling_strategy": "SPREAD"}
            actor = ray.remote(RouterActor).options(**places)
            self._routers[name] = actor.remote(settings, self._logs, self._channel, owners_node)
        settings = next(iter(routers.values()))
        self._controller_name = f"{settings.name}/{secrets.token_hex(6)}"
        named = {"name": self._controller_name, "namespace": NAMESPACE}
        controller = ray.remote(ControllerActor).options(**options, **named)
        self._controller = controller.remote(state, self._logs, Welcome.of(settings, self._channel))
        listening: list[Place] = fetched([actor.start.remote() for actor in self._routers.values()], timeout)
        return listening

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

    def stop_replica(self, replica_id: str) -> None:
        """Have the actor of a replica close its sockets, and kill it: Ray does not start it again; idempotent."""
        actor = self._replicas.pop(replica_id, None)
        if actor is not None and ray.is_initialized():
            _quietly(lambda: fetched(actor.close.remote(), PING_SECONDS))
            _quietly(lambda: ray.kill(actor, no_restart=True))

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """Wait until the actor of a replica runs. Raises Unavailable at `deadline` (monotonic seconds)."""
        timeout = max(0.1, deadline - time.monotonic())
        try:
            report: Replica = _asked(self._replicas[replica_id].report.remote, timeout)
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

    def routers(self) -> dict[str, Any]:
        """The actor of each router by name."""
        return dict(self._routers)

    def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Have the controller load the declared layers; returns the versions that then serve.

        Raises the controller's errors, ConfigError for a live object that cannot be sent, and Unavailable if the
        controller does not answer in time.
        """
        controller = self._controller

        def send() -> Any:
            try:
                return controller.declare.remote(controller, desired, timeout)
            except Exception as error:  # noqa: BLE001 (Ray pickles live objects here, whose code may raise anything)
                raise _unsendable(desired) or error from None

        versions: dict[str, str] = _asked(send, timeout + CALL_TIMEOUT)
        return versions

    def changes(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        """Answer what was asked of the owner, by number; returns what has no answer yet."""
        if (controller := self._controller) is None:
            raise Unavailable("the cluster has stopped")
        letters: tuple[Letter, ...] = _asked(lambda: controller.changes.remote(answers), CALL_TIMEOUT)
        return letters

    def state(self) -> ControllerState:
        """The state of the controller."""
        if (controller := self._controller) is None:
            raise Unavailable("the cluster has stopped")
        state: ControllerState = _asked(controller.state.remote, CALL_TIMEOUT)
        return state

    def stop(self, grace: float) -> None:
        """Drain all routers, kill every actor, shut down Ray if it was started here, and remove its folder.

        A Ray that is lost, or whose head is frozen, is not asked for anything first: it might never answer.
        """
        lost = bool(self._routers) and self._is_lost()
        if lost and self.temp_dir is not None:
            end_marked_processes(self.temp_dir)
        if self._routers and not lost:
            _quietly(lambda: self._drain(grace))
        for actor in (self._controller, *self._routers.values(), *self._replicas.values()):
            if actor is not None and not lost and ray.is_initialized():
                _quietly(lambda actor=actor: ray.kill(actor, no_restart=True))  # type: ignore[misc]
        self._replicas.clear()
        self._routers.clear()
        self._controller = None
        if self._started_ray:
            _quietly(lambda: within(SHUTDOWN_SECONDS, ray.shutdown) if lost else ray.shutdown())
            self._started_ray = False
        while self._patched:
            setattr(*self._patched.pop())
        if self._channel is not None:
            shutil.rmtree(folder_of(self._channel.run), ignore_errors=True)
        if self.temp_dir is not None:
            end_marked_processes(self.temp_dir)
            shutil.rmtree(run_folder_of(self.temp_dir), ignore_errors=True)
            self.temp_dir = None
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None

    def _drain(self, grace: float) -> None:
        """Have every router end what it has accepted, at once; one that is dead or frozen holds up no other."""
        ended = [actor.stop.remote(grace) for actor in self._routers.values()]
        ray.wait(ended, num_returns=len(ended), timeout=grace + CALL_TIMEOUT)

    def _here(self) -> dict[str, Any]:
        """Options that place an actor on this node, whose address clients use."""
        node_id = ray.get_runtime_context().get_node_id()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
        return {"scheduling_strategy": strategy}


QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}


def _logged(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log what Ray tells this process, such as that a worker was killed; it would print that on standard output."""
    text = "\n".join(map(str, data.get("lines", ())))
    log.warning("Ray: %s", text.partition("\n")[0])  # what follows may be pages of state
    log.debug("Ray: %s", text)


@contextmanager
def _same_sigterm_handler() -> Iterator[None]:
    """Restore the program's own handler of SIGTERM, which `ray.init` replaces; Ray's own exits in an orderly way."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def uploaded(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Upload the local folders of a runtime environment; returns it with their URIs.

    Ray does this only for the environment of a whole job; for a single actor this uses Ray's internal functions.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with_code = upload_working_dir_if_needed(dict(environment), True, scratch)
        answer: dict[str, Any] = upload_py_modules_if_needed(with_code, True, scratch)
    return answer


def _asked(call: Callable[[], Any], timeout: float) -> Any:
    """The answer of an actor. Where Ray has ended, a call would start another one. Raises the errors of `fetched`."""
    if not ray.is_initialized():
        raise Unavailable("Ray is not running in this process: was ray.shutdown() called?")
    return fetched(call(), timeout)


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
