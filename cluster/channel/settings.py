"""What an actor needs to take part in the direct channel, and the replica's end of it made from that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...experts.host import ExpertHost
from ..machine.facts import cores
from .core_slots import CoreSlots
from .replica_end import ChannelServer, socket_path
from .run_folder import folder_of, hold, sweep


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """The secret of a cluster's run, the node that its router runs on, and where its sockets are on a node.

    `folder` None takes one in the node's folder for temporary files, named for `run`.
    """

    secret: bytes = field(repr=False)
    run: str
    router_node: str
    folder: str | None = None


def open_channel(
    host: ExpertHost, replica_id: str, settings: ChannelSettings, node: str, address: str
) -> ChannelServer:
    """Serve a host on the node `node` with the IP address `address`: by a Unix socket where the router is, else by TCP.

    Experts on the CPU compute as many at once as the node has cores. Raises FailedPrecondition or OSError.
    """
    if settings.folder is None:
        sweep()
    folder = (
        folder_of(settings.run) if settings.folder is None or node != settings.router_node else Path(settings.folder)
    )
    hold(folder)  # for as long as this process lives
    slots = CoreSlots(folder, cores()) if host.device == "cpu" else None
    server = ChannelServer(host, replica_id, settings.secret, slots)
    if node == settings.router_node:
        server.listen_unix(socket_path(folder, replica_id, host.incarnation))
    else:
        server.listen_tcp(address)
    return server
