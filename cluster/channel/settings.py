"""An actor's settings for the direct channel, and how to open the replica's end with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...experts.host import ExpertHost
from ..machine.facts import cores
from .core_slots import CoreSlots
from .replica_end import ChannelServer, socket_path
from .run_folder import folder_of, hold, sweep


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """The secret of a cluster's run, the node of its routers, and the folder of its sockets on a node.

    With `folder` None it is one in the node's folder for temporary files, named after `run`. `spread` routers may be on
    any node, and `router_node` is that of the first.
    """

    secret: bytes = field(repr=False)
    run: str
    router_node: str
    folder: str | None = None
    spread: bool = False


def open_channel(
    host: ExpertHost,
    replica_id: str,
    settings: ChannelSettings,
    node: str,
    address: str,
    failed: Callable[[str], None],
) -> ChannelServer:
    """Serve a host on `node` with the IP address `address`: over a Unix socket on the router's node, else over TCP.

    Where routers are spread it is both, on every node.

    Experts on the CPU share as many slots as the node has cores. `failed` is called with the reason if the channel ends
    by itself. Raises FailedPrecondition or OSError.
    """
    if settings.folder is None:
        sweep()
    folder = (
        folder_of(settings.run) if settings.folder is None or node != settings.router_node else Path(settings.folder)
    )
    hold(folder)  # for as long as this process lives
    slots = CoreSlots(folder, cores()) if host.device == "cpu" else None
    server = ChannelServer(host, replica_id, settings.secret, slots, failed)
    if settings.spread or node == settings.router_node:
        path = socket_path(folder, replica_id, host.incarnation)
        server.listen_unix(path, also_on=address if settings.spread else "")
    else:
        server.listen_tcp(address)
    return server
