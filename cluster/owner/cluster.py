"""A cluster for its owner: start it, inspect it, replace an expert, and stop it without leftovers."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ...experts.errors import ConfigError, ExpertMeshError, Unavailable
from ...experts.spec import Expert
from ...router.mixture.layer import Layer
from ..client.requests import scale_asked
from ..config.cluster_config import ClusterConfig, allowed_factories
from ..config.declared_document import settings_document
from ..config.layer_changes import LayersRequest
from ..config.loader import load_config
from ..config.preflight import check_layer
from ..control.messages import ScaleRequest
from ..control.ports import StateSettings
from ..machine.logs import log_file, rotate
from ..machine.name_lock import NameLock, lock_name
from ..machine.run_files import RunFile, passing_state_path, state_path
from ..placement.capacity import unplaceable
from ..placement.plan import PlannedReplica
from ..runtime.backend import Backend, open_backend
from ..state.registry import kept_replicas
from ..state.state_lock import StateLock, hold_state
from .asked import Asked
from .changing import Changing
from .declaring import Declaring
from .following_load import FollowsLoad
from .front import FrontPorts, followed, router_settings, run_file
from .layer_methods import LayerMethods
from .resumed import NOT_KEPT, resumed
from .resumed_layers import resumed_layers
from .topology import resumed_numbers, topology_of, wait_for

Progress = Callable[[str], None]
SUPERVISE_SECONDS = 0.5
STOP_GRACE = 5.0

log = logging.getLogger(__name__)


class Cluster(LayerMethods):
    """A running cluster, owned by this process; created by `Cluster.start` or `Cluster.from_config`.

    Clients connect to any of `endpoints`, one for each router. `metrics_endpoints` are the URLs of their metrics pages,
    none when off. `endpoint` and `metrics_endpoint` are the first of each, or "".

    Example:
        experts = {"sin": Expert("numpy:sin"), "cos": Expert("numpy:cos")}
        layer = Layer("waves", gates.Fixed([0.5, 0.5]), experts, input=TensorSpec((3,)))
        with Cluster.start([layer], port=0) as cluster:
            print(cluster.endpoint)
            cluster.replace("waves/cos", Expert("numpy:tanh"))
    """

    def __init__(self, config: ClusterConfig, progress: Progress | None = None, *, keeps_state: bool = True) -> None:
        self.config = config
        self._keeps_state = keeps_state
        self.endpoint = ""
        self.endpoints: list[str] = []
        self.metrics_endpoint = ""
        self.metrics_endpoints: list[str] = []
        self._say = progress or (lambda message: None)
        self._tell: Progress = progress or (lambda message: warnings.warn(message, stacklevel=4))
        self._told_not_kept = keeps_state or progress is not None
        self._name_lock: NameLock | None = None
        self._state_lock: StateLock | None = None
        self._ports: FrontPorts | None = None
        self._run_file: RunFile | None = None
        self._backend: Backend | None = None
        self._asked = Asked(self._carry_out)
        self._declared = Declaring(settings_document(config))
        elsewhere, allowed = config.runtime_env is not None, allowed_factories(config)
        how = self._running, self._start_replica, self._state_dir
        self._changing = Changing(self._declared, *how, code_elsewhere=elsewhere, factories=allowed)
        self._change = threading.RLock()
        self._load = FollowsLoad(self.scale)
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._failure: str | None = None
        self._log_file = ""
        self._process = os.getpid()
        self._supervisor = threading.Thread(target=self._supervise, name="expertmesh-supervisor", daemon=True)

    @classmethod
    def start(
        cls,
        layers: Iterable[Layer] | None = None,
        *,
        config: ClusterConfig | None = None,
        progress: Progress | None = None,
        redeclare: Iterable[str] = (),
        **overrides: Any,
    ) -> Cluster:
        """Start a cluster with these layers; returns once every replica is ready and the gateway serves.

        With a `name` or a `state_dir` its versions and epochs are kept for the next start; without, they last until
        the cluster stops, of which `progress` is told, or a warning at the first replacement. A version that was
        swapped in serves on after a restart, also where the declaration was edited meanwhile; `progress` is told
        which, or else a warning says so. `redeclare` has the ids ("news/e3", "news/gate") that follow their
        declaration anyway.

        `overrides` are settings of ClusterConfig, such as name, port, routers, transport or address ("auto" joins a Ray
        that runs). Whatever fails, nothing is left running.

        Raises ConfigError, SpecMismatch, NotFound or DataLoss for what is wrong with the layers, NotFound for an id of
        `redeclare` that is not declared, FailedPrecondition
        for a name, port or state_dir in use, Unavailable when a replica is not ready within `start_timeout`.
        """
        if layers is not None:
            overrides["layers"] = tuple(layers)
        whole = ClusterConfig(**overrides) if config is None else replace(config, **overrides)
        kept = "name" in overrides or whole.name != ClusterConfig.name or whole.state_dir is not None
        cluster = cls(whole, progress, keeps_state=kept)
        try:
            cluster._start(frozenset(redeclare))
            atexit.register(cluster._stop_at_exit)
        except BaseException:  # also Ctrl-C: whatever was started is ended
            cluster.stop(grace=0.0)
            raise
        return cluster

    @classmethod
    def from_config(
        cls, path: str | os.PathLike[str], *, progress: Progress | None = None, **overrides: Any
    ) -> Cluster:
        """Start the cluster described by a YAML file, which keeps its versions for the next start under its name.

        Raises ConfigError that lists every mistake as file:line.
        """
        config = load_config(path, overrides)
        return cls.start(config=config, name=config.name, progress=progress)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        layers = [layer.name for layer in self.config.layers]
        shown = f"{{{len(layers)} layers}}" if len(layers) > 8 else repr(layers)
        state = "stopped" if self._stopping.is_set() else "running" if self._supervisor.is_alive() else "starting"
        return f"Cluster(name={self.config.name!r}, endpoint={self.endpoint!r}, layers={shown}, {state})"

    def status(self) -> dict[str, Any]:
        """The controller's view: name, endpoint, endpoints, epoch, versions by id, routers and replicas."""
        state = self._running().state()
        return {
            "name": self.config.name,
            "endpoint": self.endpoint,
            "endpoints": list(self.endpoints),
            "epoch": state.epoch,
            "versions": dict(state.versions),
            "routers": {name: dict(router) for name, router in state.routers.items()},
            "replicas": {
                replica.id: {
                    "state": replica.state,
                    "pid": replica.pid,
                    "node": replica.node,
                    "device": replica.device,
                    "problem": replica.problem,
                }
                for replica in state.replicas
            },
        }

    def replace(self, expert_id: str, expert: Expert, *, timeout: float = 120.0, allow_unverified: bool = False) -> str:
        """Replace one expert by a new declaration, under traffic; returns its new version.

        The new version is staged and verified beside the old one in every replica, committed, and then made current;
        requests in flight finish on the old version. Placement and number of replicas stay unchanged. To replace
        weights only, use `Client.swap`.

        An expert is built again also where its declaration is the same: a file that it reads may be another. If it then
        is what serves, bit for bit, nothing changes: a warning says so, and the version that serves is returned.
        `allow_unverified` accepts an expert that cannot be tried, because no rows were declared or served.

        Raises NotFound for an unknown expert, FailedPrecondition for one that cannot be tried, and any error of the new
        version; then the old one still serves.
        """
        with self._change:
            serves, version = self._changing.replace(expert_id, expert, timeout, unverified=allow_unverified)
        if version == serves:
            message = f"{expert_id} was replaced by what it already is: {version} serves on, and nothing has changed"
            warnings.warn(message, stacklevel=2)
        elif not self._told_not_kept:
            self._told_not_kept = True
            warnings.warn(NOT_KEPT, stacklevel=2)
        return version

    def scale(
        self, what: str | Mapping[str, int], replicas: int | None = None, *, timeout: float = 120.0
    ) -> dict[str, dict[str, int]]:
        """Give an expert or pack ("news/e3"), or several ({"news/e3": 4}), other numbers of replicas, under traffic.

        New replicas are chosen once they hold what serves; replicas are ended once they have answered all that they
        were sent. Returns then, with the number "before" and "after" by expert or pack. An expert of a pack stands for
        the pack. The numbers are kept for the next start, as versions are.

        Raises NotFound, InvalidRequest, ConfigError where no node has room, and Unavailable; then all is as before.
        """
        asked = scale_asked(what, replicas)
        with self._change:
            return self._changing.scale(asked, timeout)

    def _carry_out(self, asked: ScaleRequest | LayersRequest) -> dict[str, Any]:
        """Make a change that a client, or this process, asks for."""
        if isinstance(asked, ScaleRequest):
            return self.scale(asked.replicas, timeout=asked.timeout)
        with self._change:
            return self._changing.change(asked)

    def _start_replica(self, replica: PlannedReplica) -> None:
        with self._ending:  # or a cluster that stops would leave it behind
            if self._stopping.is_set():
                raise Unavailable("the cluster is stopping")
            self._running().start_replica(replica)

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Refuse new requests, give those in flight `grace` seconds, and stop everything; idempotent.

        A cluster that was not stopped is stopped when the process exits.
        """
        atexit.unregister(self._stop_at_exit)
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        with self._ending:
            self._end(grace)
        self._load.wait(STOP_GRACE)

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._process:  # and not in a process that was forked
            self.stop()

    def _end(self, grace: float) -> None:
        if self._backend is not None:
            self._backend.stop(grace)
            self._backend = None
        if self._run_file is not None:
            self._run_file.remove()
            self._run_file = None
        if self._state_lock is not None:
            self._state_lock.close()
            self._state_lock = None
            self._clear_passing_state()
        if self._ports is not None:
            self._ports.close()
        if self._name_lock is not None:
            self._name_lock.close()
            self._name_lock = None

    def wait(self) -> None:
        """Block until SIGINT or SIGTERM asks this process to stop. Call it from the main thread.

        Raises Unavailable if the cluster has ended by itself, because its Ray did.
        """
        stop = threading.Event()

        def handle(number: int, frame: FrameType | None) -> None:
            stop.set()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(0.2) and not self._stopping.is_set():
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise Unavailable(self._failure)

    def _start(self, redeclare: frozenset[str]) -> None:
        config = self.config
        deadline = time.monotonic() + config.start_timeout
        self._name_lock = lock_name(config.name)
        self._clear_passing_state()
        self._state_lock = hold_state(self._state_dir(), f"cluster {config.name!r}")
        self._ports = FrontPorts(config)
        elsewhere = config.runtime_env is not None
        self._say("checking experts")
        checked = {layer.name: check_layer(layer, code_elsewhere=elsewhere) for layer in config.layers}
        found = resumed_layers(checked, self._state_dir(), redeclare)
        scaled, scaled_lines = resumed_numbers(found.layers.values(), kept_replicas(self._state_dir()), redeclare)
        self._declared.topology = topology_of(found.layers.values(), scaled)
        planned = [*self._declared.topology.planned.values()]
        self._log_file = log_file(config.name)
        rotate(self._log_file)
        self._backend = backend = open_backend(config)
        self._say("starting in this process" if config.transport == "local" else "starting Ray")
        backend.start(config.address, config.start_timeout)
        if problem := unplaceable(planned, backend.nodes()):
            raise ConfigError(problem)
        routers = router_settings(config, self._ports, self._state_dir())
        for replica in planned:
            backend.start_replica(replica)
        state = StateSettings(state_dir=str(self._state_dir()), retain_epochs=config.retain_epochs)
        places = backend.start_front(routers, state, max(1.0, deadline - time.monotonic()))
        self._announce(run_file(config, places, backend.temp_dir, backend.ray()))
        wait_for(backend, planned, deadline, self._say)
        self._say("loading and verifying experts")
        self._declared.resume(found.ids)
        left, named = max(1.0, deadline - time.monotonic()), redeclare | found.redeclare
        self._declared.declare(backend, found.layers, left, named, renewed=redeclare)
        for line in [*resumed(backend.state()), *found.lines, *scaled_lines] if self._keeps_state else []:
            self._tell(line)
        if not self._keeps_state:
            self._say(NOT_KEPT)
        self._supervisor.start()
        self._say(f"serving on {', '.join(self.endpoints)}")

    def _state_dir(self) -> Path:
        if not self._keeps_state:
            return passing_state_path(self.config.name)
        return self.config.state_dir or state_path(self.config.name)

    def _clear_passing_state(self) -> None:
        """Remove the state of a cluster that keeps none: this one's, or what a dead one with its name has left."""
        if not self._keeps_state:
            shutil.rmtree(self._state_dir(), ignore_errors=True)

    def _announce(self, run: RunFile) -> None:
        if run != self._run_file:
            run.write()
            self._run_file, self.endpoint, self.endpoints = run, run.endpoint, run.endpoints
            self.metrics_endpoint, self.metrics_endpoints = run.metrics_endpoint or "", run.metrics_endpoints

    def _supervise(self) -> None:
        """Tell a restarted controller what is declared, write down where routers are, and notice that Ray has ended."""
        while not self._stopping.wait(SUPERVISE_SECONDS):
            rotate(self._log_file)
            lost = self._running().lost()
            if lost is not None:
                self._fail(f"cluster {self.config.name!r} has ended: {lost}; start it again")
                return
            try:
                self._asked.follow(self._running())
            except ExpertMeshError as error:
                log.debug("what clients ask for is not known: %s", error)
            if not self._change.acquire(blocking=False):
                continue  # a change in progress sends them itself
            try:
                state = self._running().state()
                if self._run_file is not None:
                    self._announce(followed(self._run_file, state.routers))
                self._declared.repeat(self._running(), state.revision, self.config.start_timeout)
                self._load.follow(state.asked)
                self._changing.retire()
            except ExpertMeshError as error:
                log.warning("the controller is not up to date; retrying: %s", error)
            finally:
                self._change.release()

    def _fail(self, failure: str) -> None:
        """End the cluster, whose processes would otherwise serve on for a while without anybody to restart them."""
        self._failure = failure
        self._stopping.set()
        log.error(failure)
        with self._ending:
            self._end(grace=0.0)

    def _running(self) -> Backend:
        if self._backend is None or self._failure is not None:
            raise Unavailable(self._failure or "the cluster is not running")
        return self._backend
