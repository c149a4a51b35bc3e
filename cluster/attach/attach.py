"""Joins a running cluster from a process of its Ray: finds it, gives the process a router, and has it brought up."""

from __future__ import annotations

import secrets
import time

from ...experts.errors import FailedPrecondition
from ..client.requests import check_timeout
from ..client.retry import RetryPolicy
from ..machine.run_files import find
from ..runtime.ray_environment import load_attach
from .engine import Engine
from .router import AttachedRouter


def attach(
    name_or_address: str | None = None,
    *,
    name: str | None = None,
    timeout: float = 30.0,
    attach_timeout: float = 60.0,
    retry: RetryPolicy | None = None,
) -> AttachedRouter:
    """Give this process a router of its own in a running cluster, so that its calls go to the experts directly.

    `name_or_address` is the name of a cluster that this user runs on this machine (None: the only one), or "host:port"
    of the head of its Ray, where `name` says which cluster if there are several. The process joins that Ray as one of
    its own and thereby belongs to the trusted side: it holds Ray's token, and may do whatever an admin may. To a Ray
    that demands a token, and is given by its address, it presents the one that Ray finds (RAY_AUTH_TOKEN_PATH, or
    RAY_AUTH_TOKEN). Classes of gates of your own must be importable here.

    Returns once the router serves the current epoch. `timeout` is the default of all calls, in seconds,
    `attach_timeout` bounds the joining. `retry` None makes at most 3 attempts per call. The router is a member of the
    cluster like every other: swaps wait for it, and one that is frozen or cut off is given up after its lease, and
    answers nothing before it is up to date again.

    Raises NotFound without such a cluster, FailedPrecondition where this process uses another Ray already, or the
    cluster has none, and Unavailable if the router was not brought up to date in time.

    Example:
        with expertmesh.attach("news") as router:
            y = router.forward("news", x)
    """
    deadline = time.monotonic() + check_timeout(attach_timeout)
    check_timeout(timeout)
    if name_or_address is not None and ":" in name_or_address:
        address, cluster, actor, token_path = name_or_address, name, None, None
    else:
        run = find(name_or_address if name is None else name)
        if run.ray_address is None:
            raise FailedPrecondition(
                f"cluster {run.name!r} has no Ray that other processes can join (transport local, or started by an "
                "earlier expertmesh): call it through Client"
            )
        address, cluster, actor, token_path = run.ray_address, run.name, run.ray_controller, run.ray_token_path
    member = f"attached-{secrets.token_hex(4)}"
    ray_attach = load_attach(token_path)
    engine = Engine(ray_attach.connect(member, address, cluster, actor, deadline - time.monotonic()))
    engine.start(max(1.0, deadline - time.monotonic()))
    return AttachedRouter(engine, timeout=timeout, retry=retry)
